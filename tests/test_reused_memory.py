"""Memory that comes back: only once nothing refers to it."""

from paperlib.reused_memory import ReusedMemory


def test_what_nobody_holds_is_given_again():
    memory = ReusedMemory()
    place = memory.take(3, 4).data_ptr()
    assert memory.take(2, 5).data_ptr() == place


def test_what_is_held_is_not_given_again():
    memory = ReusedMemory()
    tensor = memory.take(3, 4).fill_(1)
    part = tensor.view(-1)[2:4]
    row = tensor[:1].numpy()
    del tensor
    other = memory.take(3, 4).fill_(2)
    assert part.tolist() == [1, 1] and row.tolist() == [[1] * 4]
    assert set(other.flatten().tolist()) == {2}
    place = part.data_ptr() - 2 * part.element_size()
    del part
    assert memory.take(3, 4).data_ptr() != place
    del row
    assert place in {tensor.data_ptr() for tensor in [memory.take(3, 4), memory.take(3, 4)]}


def test_what_is_too_small_is_left():
    memory = ReusedMemory()
    place = memory.take(3, 4).data_ptr()
    larger = memory.take(3, 5)
    assert larger.shape == (3, 5)
    assert memory.take(12).data_ptr() == place


def test_its_memory_outlives_it():
    tensor = ReusedMemory().take(1000).fill_(3)
    assert (tensor == 3).all()
