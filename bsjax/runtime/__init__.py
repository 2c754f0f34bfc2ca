"""From a prompt to an answer: inputs, programs, generation, results."""
