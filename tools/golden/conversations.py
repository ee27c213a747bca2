"""Conversations for the cases. Paths are relative to testdata/golden."""


def text(words):
    return {"type": "text", "text": words}


def image(name):
    return {"type": "image", "path": f"media/{name}"}


def video(name):
    path = [f"media/{part}" for part in name] if isinstance(name, list) else f"media/{name}"
    return {"type": "video", "path": path}


def user(*content):
    return {"role": "user", "content": list(content)}


def assistant(words):
    return {"role": "assistant", "content": [text(words)]}


SYSTEM = {
    "role": "system",
    "content": [text("A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
                     "detailed, and polite answers to the human's questions.")],
}


def case(name, *conversations, batched=None, template=None, processor=None, generate=(), tensors=(), labels=False, notes=()):
    return {
        "name": name,
        "batched": len(conversations) > 1 if batched is None else batched,
        "conversations": [list(c) for c in conversations],
        "template_kwargs": template or {"add_generation_prompt": True},
        "processor_kwargs": {"padding": True, **(processor or {})},
        "generate": list(generate),
        "tensors": list(tensors),
        "labels": labels,
        "notes": list(notes),
    }


TEXT_ONLY = [user(text("What is it? It isn't a video, is it?"))]
ONE_IMAGE = [user(image("rgb-37x53.png"), text("What is shown in this image?"))]
ONE_VIDEO = [user(video("clip-64x48.mp4"), text("Why is this video funny?"))]
MIXED = [
    user(text("What’s shown in this image?"), image("rgb-37x53.png")),
    assistant("This image shows a red stop sign."),
    user(video("clip-bt709.mp4"), text("Why is this video funny?")),
]
FRAMES = {"num_frames": 3}


def usual():
    """The set every configuration has."""
    return [
        case("text-only", TEXT_ONLY, generate=["greedy", "beam3"], tensors=["logits", "attentions", "logits_keep_3"]),
        case("one-image", ONE_IMAGE, generate=["greedy", "greedy-eos", "beam3"], tensors=["vision_hidden_states"]),
        case("one-video", ONE_VIDEO, processor={"num_frames": 4}, generate=["greedy", "beam3"]),
        case("mixed-turns", MIXED, processor=FRAMES, generate=["greedy", "beam3"]),
        case(
            "batch-kinds", ONE_IMAGE, ONE_VIDEO, [user(text("How many people are there?"))],
            processor=FRAMES, generate=["greedy", "greedy-eos", "beam3"],
        ),
        case("labels-right-padded", ONE_IMAGE, [user(text("Who?"))], labels=True, tensors=["loss_only"]),
    ]


def full():
    """What only the default configuration has, on top of the usual set."""
    two_images = [user(image("rgb-37x53.png"), image("rgb-100x30.png"), text("What are the two cats doing in these images?"))]
    over_turns = [
        SYSTEM,
        user(image("jpeg-exif6.jpg"), text("Describe the picture.")),
        assistant("There are some people in the street."),
        user(text("Is it the same place as here?"), image("png-rgba.png"), image("rgb-30x100.png")),
    ]
    two_videos = [user(video("clip-64x48.mp4"), video("clip-tall-34x90.mp4"), text("How many people are in the second video?"))]
    return usual() + [
        case("image-wide", [user(image("rgb-30x100.png"), text("What is it?"))]),
        case("image-very-wide", [user(image("rgb-5x90.png"), text("What is it?"))], generate=["greedy"]),
        case("image-tiny", [user(image("rgb-2x4.png"), text("What is it?"))]),
        case("image-photo", [user(image("photo-301x212.jpg"), text("What is shown in this image?"))], generate=["greedy-penalty"]),
        case("two-images", two_images, generate=["greedy", "beam3"]),
        case("images-over-turns", over_turns, generate=["greedy"]),
        case("two-videos", two_videos, processor=FRAMES, generate=["greedy", "beam3"]),
        case("video-fps", [user(video("clip-odd-70x46.mp4"), text("What?"))], processor={"fps": 1}, generate=["greedy"]),
        case("video-all-frames", [user(video("clip-444.mp4"), text("What?"))]),
        case("video-of-images", [user(video(["rgb-64x64.png"] * 2), text("What?"))], generate=["greedy"]),
        case("image-as-batch-of-one", ONE_IMAGE, batched=True, tensors=["loss_only"]),
        case(
            "continue-final", [*ONE_IMAGE, assistant("This image shows")], template={"continue_final_message": True},
            generate=["greedy", "greedy-no-repeat"],
        ),
        case(
            "batch-texts", TEXT_ONLY, [user(text("Who?"))], [SYSTEM, user(text("Where are the dogs?"))],
            generate=["greedy", "greedy-penalty", "greedy-eos", "beam3", "beam3-eos", "beam4-early", "beam2-penalty"],
        ),
        case(
            "batch-images", ONE_IMAGE, two_images, [user(image("rgb-64x64.png"), text("Why?"))],
            generate=["greedy", "greedy-eos", "beam3-eos"],
        ),
        case("batch-videos", ONE_VIDEO, [user(video("clip-full.mp4"), text("Why?"))], processor=FRAMES, generate=["greedy", "beam3"]),
    ]


SETS = {"usual": usual, "full": full}
