"""A small text to train the tiny tokenizers on."""

LINES = [
    "A chat between a curious human and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    "USER: What is shown in this image? ASSISTANT: This image shows a red stop sign.",
    "USER: Why is this video funny? ASSISTANT: The baby is wearing glasses and reading a book.",
    "USER: What is shown in this video? ASSISTANT: A dog runs after the ball in the garden.",
    "[INST] What are the two cats doing in these images? [/INST] They sleep on the sofa.",
    "user\nDescribe the picture.\nassistant\nThere are some people in the street.\nsystem\nYou are a helpful assistant.",
    "How many people are in the second video? Is it the same place as in the first image?",
    "It isn't raining, is it? We don't know, I'm sure they've seen it, and you're right.",
    "The quick brown fox jumps over the lazy dog. 0 1 2 3 4 5 6 7 8 9 10 100 2024",
    "the image the video the images the videos what where when why who which how",
    "this is that was were are there here one two three four five six",
    "colour size shape left right top bottom behind before after with without",
]
