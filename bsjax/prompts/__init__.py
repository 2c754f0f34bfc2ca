"""From chat messages to a prompt: token ids, pixel values and the tokens of each image.

messages    their form: what the chat template gets, and which images they hold
images      reading images from files, URLs, data and arrays
prompt      `Processor`: rendering, tokens, patches
"""
