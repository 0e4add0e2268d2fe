"""Twenty sentences to compare a model on: short and long, numbers, accents, other scripts, a riddle."""

from __future__ import annotations

__all__ = ["SENTENCES"]

SENTENCES = (
    "The cat slept on the warm stones of the courtyard.",
    "Yes.",
    "How far is it from the harbour to the old lighthouse, and can one walk there at low tide?",
    "In 1969 the guidance computer of the lunar module had 2,048 words of erasable memory.",
    "She poured the tea, sat down by the window and read the letter a second time.",
    "Attention moves bytes; the fewer it moves between HBM and the chip, the faster it runs.",
    "The committee postponed its decision because three of its seven members were ill.",
    "Zürich, Kraków, Århus and São Paulo all have trams.",
    "Water boils at 100 °C at sea level, but at about 71 °C on the summit of Mount Everest.",
    "Ein kurzer deutscher Satz steht hier, damit nicht alles englisch ist.",
    "今日はとても良い天気ですね。",
    "Δεν υπάρχει βασιλική οδός προς τη γεωμετρία.",
    "If all bloops are razzies and all razzies are lazzies, then all bloops are lazzies.",
    "The price fell from $1,299.00 to $899.99 (a drop of 30.7%), including V.A.T.",
    "def f(x): return x if x < 2 else f(x - 1) + f(x - 2)",
    "Nobody knew who had painted the small portrait that hung, slightly crooked, above the piano.",
    "BUY NOW!!! Limited offer, click here >>> http://example.org/?a=1&b=2 <<<",
    "Supercalifragilisticexpialidocious antidisestablishmentarianism.",
    "A quick brown fox jumps over the lazy dog, the dog wakes up, the fox runs away across the frozen river, "
    "and the farmer, who has seen it all from the barn door, goes back to mending the fence before it snows.",
    "What has keys but opens no lock, space but no room, and lets you enter but never go in?",
)
