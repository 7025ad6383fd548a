import numpy as np
import pytest

from jaxrlhf.models.activations import ACTIVATIONS


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_name_computes_what_transformers_computes_under_it(name):
    torch = pytest.importorskip("torch", reason="torch is the reference")
    reference = pytest.importorskip("transformers").activations.ACT2FN
    if name not in reference:
        pytest.skip("this transformers does not know the name")
    x = np.concatenate([np.linspace(-12, 12, 97), [0.0]]).astype(np.float32)
    expected = reference[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](x), expected, atol=2e-6)
    assert np.ptp(expected) > 0.5
