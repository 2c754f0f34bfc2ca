"""From messages to an answer: inputs, compiled programs, and the stages that run them.

generation    `generate`, `stream` and `forward`
inputs        a prompt's arrays: packed, padded, with schedules and vision plans
embedding     stage: token embeddings and image features
answering     stage: prefill and decoding
scoring       stage: logits of all tokens
memory        the memory of each stage, and the check that a prompt fits
programs      ahead-of-time compilation of programs
sampling      choosing the next token
results       `Result` and `Stats`
"""
