"""The check on held-out samples: what a profile changes in what the model says."""

import numpy as np

from bsjax.checkpoint.loading import LoadedModel
from bsjax.profiles.profile import Profile
from bsjax.profiling.evaluation import Evaluator
from bsjax.profiling.ordered_samples import OrderedSamples
from bsjax.profiling.progress import Progress, no_progress
from bsjax.profiling.state import NO_STATE, State
from bsjax.runtime.generation import generate


def check_end_to_end(
    model: LoadedModel,
    profile: Profile,
    samples: OrderedSamples,
    *,
    answer_tokens: int = 8,
    backend: str = "auto",
    progress: Progress = no_progress,
    state: State = NO_STATE,
) -> dict[str, float]:
    """Compares a profile with dense attention on samples it has not seen.

    Args:
      model: from `bsjax.load`.
      profile: to check.
      samples: held out.
      answer_tokens: tokens of the answers at most.
      backend: of the attention.
      progress: told of every sample.
      state: keeps what was compared, and recalls it.

    Returns:
      `kl_divergence` (dense to sparse, in nats) and `top_1_agreement` of next-token distributions
      along the dense answer; `answer_agreement`, the share of samples whose greedy answers are the
      same, token by token; and `attention_flops_reduction` over these samples.
    """
    evaluator = Evaluator(
        model,
        samples,
        answer_tokens=answer_tokens,
        sinks=profile.sinks,
        backend=backend,
        state=state,
        progress=progress,
        stage="reading held-out samples",
    )
    comparison = evaluator.compare(profile.categories)
    agreed = []
    progress("answering held-out samples", 0, len(samples.messages))
    for index, digest in enumerate(samples.fingerprints):

        def answered(index: int = index) -> dict[str, np.ndarray]:
            result = generate(
                model,
                samples.messages[index],
                profile=profile,
                max_new_tokens=answer_tokens,
                backend=backend,
            )
            return {"answer": np.asarray(result.token_ids, np.int64)}

        categories = profile.categories.tobytes().hex()
        record = state.recall(
            f"answer {digest} {profile.sinks} {answer_tokens} {categories}", answered
        )
        agreed.append(tuple(record["answer"].tolist()) == evaluator.dense_answers[index])
        progress("answering held-out samples", index + 1, len(samples.messages))
    return {
        "kl_divergence": comparison.kl,
        "top_1_agreement": comparison.top1,
        "answer_agreement": sum(agreed) / len(agreed),
        "attention_flops_reduction": evaluator.reduction(profile.categories),
    }
