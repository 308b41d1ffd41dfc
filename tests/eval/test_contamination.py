"""Whether a problem was seen in training, against a plain search through text."""

from hypothesis import given
from hypothesis import strategies as st

from finback.data.problems import generate_problems
from finback.eval.contamination import occurrences, overlap, question_hash, words
from finback.eval.task import Task
from finback.rewards.answers import exact, final_answer
from finback.rewards.reward import Reward

EXACT = Reward("exact", exact)


def task_of(*questions: str) -> Task:
    return Task("t", [{"question": question, "answer": ""} for question in questions], EXACT, final_answer)


def test_a_hash_sees_through_spelling() -> None:
    assert question_hash("What is 3 + 5?") == question_hash("what  is\n3+5") == question_hash("Ｗhat is ３＋５？")
    different = ["What is 3 + 5?", "What is 5 + 3?", "What is 3 - 5?", "What is 35?", "What was 3 + 5?", "What is 3.5?"]
    assert len(set(map(question_hash, different))) == len(different)
    assert question_hash("计算3 + 5。") == question_hash("计算 3+5") != question_hash("算计3 + 5")


def test_overlap_counts_problems() -> None:
    task = task_of("What is 3 + 5?", "What is 4 + 5?", "Sort 3, 1, 2.")
    assert overlap(task, {question_hash("what is 3+5"), question_hash("sort 3 1 2"), question_hash("other")}) == 2
    assert overlap(task, set()) == 0


def test_questions_are_found_inside_running_text() -> None:
    task = task_of("What is 3 + 5?", "What is 4 + 5?", "数列1, 2, 3的下一个数是多少？", "How?")
    texts = [
        "Once, a fox. Question: What is\n3+5 ? <think>...",
        "题：数列 1,2,3 的下一个数是多少",
        "What is 4 + 50? What is 14 + 5?",
        "How now",
    ]
    assert [example["question"] for example in occurrences(task, texts)] == ["What is 3 + 5?", "数列1, 2, 3的下一个数是多少？"]
    assert [example["question"] for example in occurrences(task, ["how"])] == ["How?"]


def test_a_sum_inside_a_longer_one_is_another_question() -> None:
    task = task_of("What is 3 + 5?", "4 + 5等于多少？")
    assert occurrences(task, ["What is 3 + 5 + 9?", "3 + 4 + 5等于多少？", "What is 3 + 5 - 2"]) == []
    assert len(occurrences(task, ["What is 3 + 5?\n3 + 5 = 8", "第2题：4 + 5等于多少？\n4 + 5 = 9"])) == 2
    assert len(occurrences(task, ["What is 3 + 5\n<think>\n3 + 5 = 8", "4 + 5等于多少"])) == 2


def test_no_text_holds_nothing() -> None:
    task = task_of("What is 3 + 5?")
    assert occurrences(task, []) == []


@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=7), max_size=5),
    st.lists(st.lists(st.sampled_from("abcd"), max_size=30), max_size=4),
)
def test_occurrences_are_those_of_a_plain_search(questions: list[list[str]], texts: list[list[str]]) -> None:
    task = task_of(*(" ".join(question) for question in questions))
    joined = [f" {' '.join(words(' '.join(text)))} " for text in texts]

    def is_inside(question: str) -> bool:
        cut = words(question)
        return any(f" {' '.join(cut)} " in text if len(cut) >= 4 else f" {' '.join(cut)} " == text for text in joined)

    expected = [example["question"] for example in task.examples if is_inside(example["question"])]
    assert [example["question"] for example in occurrences(task, (" ".join(text) for text in texts))] == expected


def test_training_problems_hold_no_held_out_one() -> None:
    held_out = [problem.question for problem in generate_problems(200, held_out=True)]
    training = [problem.text for problem in generate_problems(4000)]
    task = task_of(*held_out)
    assert occurrences(task, training) == []
    assert len(occurrences(task, [*training, f"Question: {held_out[7]}\n"])) >= 1
