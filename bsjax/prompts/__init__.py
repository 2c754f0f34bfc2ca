"""From chat messages to a prompt: token ids, pixel values and the tokens of each image."""
