import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.evaluation.wikitext import detokenize, num_words


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
def test_detokenization(apart, together):
    assert detokenize(apart) == together


@given(st.text(alphabet="ab \n.,'\"()=@-"))
def test_no_word_is_lost(text):
    assert [c for c in detokenize(text) if c in "ab"] == [c for c in text if c in "ab"]


def test_line_ends_count_as_words():
    assert num_words(" \n = Homarus gammarus = \n \n Homarus gammarus , known \n") == 12
