import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.evaluation.detokenizers import detokenize_penn_treebank, detokenize_wikitext, num_words


@pytest.mark.parametrize(
    ("apart", "together"),
    [
        ("a hard @-@ shelled male of 0 @.@ 7 kg and 10 @,@ 000 eggs", "a hard-shelled male of 0.7 kg and 10,000 eggs"),
        ("In life , the lobsters are blue . They", "In life, the lobsters are blue. They"),
        ("60 cm ( 24 in ) and [ 1 ]", "60 cm (24 in) and [1]"),
        ('becoming " lobster red " on', 'becoming "lobster red" on'),
        ("the world 's largest , the players ' union", "the world's largest, the players' union"),
        (" \n = = Description = = \n \n It", "\n== Description ==\n\nIt"),
        ("at 5 ° C", "at 5°C"),
    ],
)
def test_wikitext(apart, together):
    assert detokenize_wikitext(apart) == together


@pytest.mark.parametrize(
    ("apart", "together"),
    [
        (" no it was n't black monday \n but while", "no it wasn't black monday\nbut while"),
        ("the new york stock exchange did n't fall", "the new york stock exchange didn't fall"),
        ("it 's N N of $ N billion", "it's 1 1 of $1 billion"),
        ("rose N \n # N <unk>", "rose 1\n#1 <unk>"),
    ],
)
def test_penn_treebank(apart, together):
    assert detokenize_penn_treebank(apart) == together


@pytest.mark.parametrize("detokenize", [detokenize_wikitext, detokenize_penn_treebank])
@given(st.text(alphabet="ab \n.,'\"()=@-"))
def test_no_word_is_lost(detokenize, text):
    assert [c for c in detokenize(text) if c in "ab"] == [c for c in text if c in "ab"]


def test_line_ends_count_as_words():
    assert num_words(" \n = Homarus gammarus = \n \n Homarus gammarus , known \n") == 12
