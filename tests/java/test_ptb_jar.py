"""The tokenizer against Stanford's, run live."""

from __future__ import annotations

import random
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from rayrl.rewards.ptb import PUNCTUATION, tokenize

FLICKR8K = Path(__file__).resolve().parents[3] / "shared" / "flickr8k"

pytestmark = [
    pytest.mark.java,
    pytest.mark.skipif(shutil.which("java") is None, reason="no java on the PATH"),
]

FRAGMENTS = """A a The the dog man's boys' don't CAN'T won't it's I'm they're she'd o'clock ’s 'til
don’t it’s “hi” ‘hi’ "hi" 'hi' `hi` ``hi'' cannot Gonna wanna gotta lemme gimme 'tis 'twas y'all
ma'am rock'n'roll hallowe'en O'Brien D'Angelo l'eau Shi'ite Qu'ran s'mores li'l dunkin' cont'd n't
t-shirt black-and-white 20-year-old re- -ly - -- --- ----- – — … ... . .. , ; : ! ? !! ?! ( ) [ ] {
} < > <eos> <unk> </s> <a b> / 1 10 1,000 3.5 .5 5. 1st 1990s '90s 90's '90 10:30pm 5'10" 6-foot
1/2 ½ 2½ 24/7 9/11 12/25/2010 555-1234 (555) 555 1234 800.555.1234 +1 -5 50% $5.00 £5 €5 5¢ US$ #1
# @ & * ** + = ~ ^ _ | \\ % Mr. Mrs. Dr. St. Inc. Co. Ltd. Jan. No. no. vs. etc. e.g. a.m. U.S.
U.S.A. u.s. Ph.D. J. J.K. A. B. pp. fig. vol. Ave. approx. ft. in. Wash. D.C. la. La. mar. sun. co.
mo. art. op. ill. miss. Mass. dept. http://foo.com/bar?x=1 https://a.b/c. www.foo.com/bar foo.com
a@b.com <a@b.com> @user #tag index.html IMG_1234.JPG v1.2.3 a_b __init__ :) :-) ;) :( :D =) <3 ^_^
-_- T_T >_< café naïve ñ 你好 日本語 привет مرحبا हिन्दी ไทย 한국 É ß ﬁ ™ ® © ° ² º № € ¥ × ÷ ± → ★ ♥
😀 👍🏽 AT&T R&B M&M's a&b &amp; &lt; &quot; &apos; &nbsp; &#39; &eacute; and/or w/ w/o a/b/c 4x4 3D
2x4s 7-Eleven C++ C# .net Node.js Yahoo! -lrb- -LRB- anti- non-U.S. U.S.-based mid-1990s post-9/11
\u200b soft\u00adhyphen \ufeff \x7f e\u0301"""
WORDS = [*FRAGMENTS.split(), "a\u00a0b", "\u2009", "\u3000"]
GLUE = [" ", " ", " ", "", "", "  ", ",", ".", "'", '"', "-", "'s", ". ", ") ", " (", "/", "!"]


def nasty_strings(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    cases = (str, str, str, str, str.upper, str.title)
    return [
        "".join(
            rng.choice(cases)(rng.choice(WORDS)) + rng.choice(GLUE)
            for _ in range(rng.choice((1, 1, 2, 2, 3, 4, 6)))
        )
        for _ in range(count)
    ]


def reference_tokens(captions: list[str], folder: Path) -> list[list[str]]:
    """What pycocoevalcap makes of captions.  A neutral line follows each, since the reference's
    rules look beyond the end of a line."""
    spec = find_spec("pycocoevalcap")
    assert spec is not None and spec.submodule_search_locations
    tokenizer = Path(spec.submodule_search_locations[0]) / "tokenizer"
    text = folder / "captions.txt"
    text.write_text("".join(f"{caption.replace(chr(10), ' ')}\nq\n" for caption in captions))
    jar = tokenizer / "stanford-corenlp-3.4.1.jar"
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", str(text)]
    run = subprocess.run(command, capture_output=True, check=True, encoding="utf-8")
    lines = run.stdout.split("\n")[: 2 * len(captions)]
    assert lines[1::2] == ["q"] * len(captions)
    return [
        " ".join(word for word in line.split(" ") if word not in PUNCTUATION).split()
        for line in lines[::2]
    ]


def differences(captions: list[str], folder: Path) -> list[tuple[str, list[str], list[str]]]:
    """Captions with the reference's tokens and ours where they differ.

    About once in 8192 characters, where its input buffer ends, the reference runs tokens together;
    so what differs is asked again in a short file.
    """
    for _ in range(2):
        expected = reference_tokens(captions, folder)
        different = [
            (caption, want, tokenize(caption))
            for caption, want in zip(captions, expected, strict=True)
            if tokenize(caption) != want
        ]
        captions = [caption for caption, _, _ in different]
        if not captions:
            break
    return different


def test_generated_strings_agree_with_the_reference(tmp_path: Path) -> None:
    assert differences(nasty_strings(seed=7, count=4000), tmp_path) == []


@pytest.mark.flickr8k
@pytest.mark.skipif(not FLICKR8K.exists(), reason="no ../shared/flickr8k")
def test_all_captions_of_flickr8k_agree_with_the_reference(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    captions = [
        caption
        for split in ("train", "val")
        for row in parquet.read_table(FLICKR8K / f"{split}.parquet", columns=["captions"])[
            "captions"
        ].to_pylist()
        for caption in row
    ]
    assert len(captions) == 35000
    assert differences(captions, tmp_path) == []
