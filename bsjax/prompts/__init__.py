"""From chat messages to a prompt: token ids, pixel values and the tokens of each image.

messages    checks chat messages, and separates images from what the chat template needs
images      reads images from files, URLs, data and arrays
prompt      `Processor`: renders the chat template, tokenizes it and cuts images into patches
"""
