"""A small Qwen2.5-VL, trained from scratch on questions about several images.

    python -m examples.train_small_vlm FOLDER

scenes      several images with digits and shapes in colours, of random number and size
questions   what can be asked about a scene, and the right answers
files       the model's configuration, tokenizer, chat template and image settings
batches     scenes and questions as arrays; questions about one scene share its images
forward     a batch through bsjax's modules
loss        answers, and the intermediate steps that are taught
training    optimizer, stages, checkpoints
curve       the learning curve of a run
export      the trained weights as a Hugging Face checkpoint

conversations   scenes and questions as chat messages, and as files to profile on
held_out        held-out prompts, and which of them are answered right
"""
