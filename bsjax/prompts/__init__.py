"""From chat messages to a prompt: token ids, pixel values and the tokens of each image.

messages          checks chat messages, and separates images from what the chat template needs
sources           `ImageSources`: where images may come from, and limits on them
downloads         downloads within these limits
images            reads images from files, URLs, data and arrays
image_reader      threads that decode and scale images
known_images      digests of images that come again, found without decoding them
rendering         renders chat templates
template_process  the process that renders them
prompt            `Processor`: renders the chat template, tokenizes the text and cuts images into
                  patches
"""
