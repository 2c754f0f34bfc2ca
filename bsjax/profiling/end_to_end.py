"""The check on held-out samples: how a profile changes the model's answers."""

import numpy as np

from bsjax.checkpoint.loading import LoadedModel
from bsjax.checks import naming
from bsjax.profiles.profile import Profile
from bsjax.profiling.evaluation import Evaluator
from bsjax.profiling.ordered_samples import OrderedSamples
from bsjax.profiling.state import State
from bsjax.progress import Progress
from bsjax.runtime.generation import generate


def check_end_to_end(
    model: LoadedModel,
    profile: Profile,
    samples: OrderedSamples,
    *,
    answer_tokens: int,
    backend: str,
    progress: Progress,
    state: State,
) -> dict[str, float]:
    """Compares a profile with dense attention on samples that it was not chosen with.

    Args:
      model: from `bsjax.load`.
      profile: the profile to check.
      samples: held-out samples.
      answer_tokens: the most tokens of an answer to compare.
      backend: backend of the attention.
      progress: called after every sample.
      state: keeps and recalls what was compared.

    Returns:
      `kl_divergence` (KL(dense || sparse) in nats) and `top_1_agreement` of next-token
      distributions along the dense answer; `answer_agreement`, the share of samples whose greedy
      answers have the same tokens; and `attention_flops_reduction` over these samples.
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

        @naming(samples.places[index])
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
