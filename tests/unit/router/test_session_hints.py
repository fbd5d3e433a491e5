"""Where the last turn of a session was computed."""

from router.session_hints import MAX_SESSIONS, SessionHints


def test_the_instance_of_the_last_turn_probably_has_its_prompt() -> None:
    hints = SessionHints()
    hints.note("s", "p0", 100)
    hints.note("s", "p1", 300)
    hints.note("other", "p0", 1000)

    assert hints.cached_tokens("s", "p1", 400) == 300
    assert hints.cached_tokens("s", "p0", 400) == 0
    assert hints.cached_tokens("unknown", "p0", 400) == 0


def test_a_token_is_left_to_compute() -> None:
    hints = SessionHints()
    hints.note("s", "p0", 100)

    assert hints.cached_tokens("s", "p0", 100) == 99


def test_the_sessions_that_were_quiet_longest_are_forgotten() -> None:
    hints = SessionHints()
    hints.note("first", "p0", 100)
    for number in range(MAX_SESSIONS - 1):
        hints.note(f"s{number}", "p0", 100)
    hints.note("first", "p0", 100)
    hints.note("new", "p0", 100)

    assert hints.cached_tokens("s0", "p0", 200) == 0
    assert hints.cached_tokens("first", "p0", 200) == 100
    assert hints.cached_tokens("new", "p0", 200) == 100
