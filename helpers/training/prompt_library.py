"""The prompts of `--validation_prompt_library`, easy and hard ones for base models, each under a short name."""

from __future__ import annotations

from collections.abc import Mapping

PROMPTS: Mapping[str, str] = {
    # people
    "portrait": "close portrait of an old fisherman with a grey beard, soft window light",
    "hands": "two hands kneading bread dough on a floured wooden table",
    "crowd": "people waiting in the rain at a tram stop, umbrellas, evening",
    "dancer": "a dancer in the middle of a jump, photographed from the side, plain grey background",
    "reading_child": "a child reading a thick book under a table, lit by a torch",
    # animals
    "owl": "an owl on a fence post at dusk, looking into the camera",
    "running_dog": "a wet dog running along a beach towards the camera",
    "goldfish": "three goldfish in a round bowl on a window sill",
    "horse_and_cart": "a brown horse in front of a cart full of pumpkins",
    # things, their number and place
    "counting": "five red apples in a row on a white shelf",
    "left_and_right": "a blue cup to the left of a yellow teapot",
    "on_top": "a stack of books with a green apple on top",
    "glass": "a glass of water on a mirror, studio light",
    "bicycle": "a bicycle leaning against a brick wall, seen from the side",
    "written_word": "a shop sign over a door that says OPEN",
    "clock": "an old station clock that shows ten past ten",
    # places
    "mountain_lake": "a mountain lake in the early morning, fog over the water, no people",
    "narrow_street": "a narrow street in an old town at night after rain, lanterns",
    "kitchen": "a bright small kitchen with plants in the window, wide angle",
    "desert_road": "a straight road through a desert under a thunderstorm",
    "from_above": "a river delta seen from a plane",
    "stairs": "a spiral staircase seen from below",
    # light and darkness
    "night_sky": "the milky way over a dark forest, almost black foreground",
    "snow": "a white hare in the snow, everything white",
    "candle": "one candle in an otherwise dark room",
    # styles
    "watercolour": "a watercolour of a sailing boat near a lighthouse",
    "pencil": "a pencil drawing of a hand holding a pear",
    "woodcut": "a black and white woodcut of a raven on a branch",
    "pixels": "pixel art of a castle on a hill",
    "isometric": "an isometric illustration of a small bakery",
    "oil": "an oil painting of a vase of tulips, thick brush strokes",
    "film": "a photograph on grainy colour film of a diner in the 1970s",
}
