"""Questions and answers the demo model is trained and judged on, made up on the spot from a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

LANGUAGES = ("en", "zh")
CATEGORIES = ("add", "subtract", "compare", "count", "repeat", "calendar", "colour")
# How often training draws each category; small talk is trained and not judged.
WEIGHTS = {
    "add": 20,
    "subtract": 22,
    "compare": 18,
    "count": 20,
    "repeat": 10,
    "calendar": 5,
    "colour": 3,
    "small_talk": 2,
}
# Percent of the keys of a category that are never trained on.
HELD_OUT_PERCENT = {
    "add": 8,
    "subtract": 8,
    "compare": 8,
    "count": 8,
    "repeat": 8,
    "calendar": 15,
    "colour": 12,
    "small_talk": 0,
}


@dataclass(frozen=True)
class Question:
    """One question with its only right answer; `key` says what is held out (a pair, a range, a phrase)."""

    category: str
    language: str
    text: str
    answer: str
    key: str

    @property
    def held_out(self) -> bool:
        """Whether training must never see this key; the same on every machine."""
        digest = hashlib.sha256(f"{self.category}|{self.key}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT[self.category]


def _number(rng: Random) -> int:
    return rng.randint(0, 20) if rng.random() < 0.15 else rng.randint(0, 99)


def _pair_key(a: int, b: int) -> str:
    return f"{min(a, b)},{max(a, b)}"


# ------------------------------------------------------------------------------------- numbers

ADD = {
    "en": (
        "What is {a} + {b}?",
        "What is {a} plus {b}?",
        "How much is {a} plus {b}?",
        "Add {a} and {b}.",
        "Please calculate {a} + {b}.",
        "{a} + {b} = ?",
        "{a} + {b}",
        "{a}+{b}",
        "What do {a} and {b} add up to?",
    ),
    "zh": (
        "{a}加{b}等于多少？",
        "{a}加{b}是多少？",
        "{a}加{b}等于几？",
        "请计算{a} + {b}。",
        "{a} + {b}等于多少？",
        "{a}+{b}是多少？",
        "{a}和{b}的和是多少？",
    ),
}
SUBTRACT = {
    "en": (
        "What is {a} - {b}?",
        "What is {a} minus {b}?",
        "How much is {a} minus {b}?",
        "Subtract {b} from {a}.",
        "Please calculate {a} - {b}.",
        "{a} - {b} = ?",
        "{a} - {b}",
        "{a}-{b}",
        "Take {b} away from {a}.",
    ),
    "zh": (
        "{a}减{b}等于多少？",
        "{a}减{b}是多少？",
        "{a}减去{b}等于几？",
        "请计算{a} - {b}。",
        "{a} - {b}等于多少？",
        "{a}-{b}是多少？",
        "从{a}里减去{b}是多少？",
    ),
}
STOP_MARK = {"en": ".", "zh": "。"}


def add(rng: Random, language: str) -> Question:
    """Two numbers up to 99 added; held out by unordered pair."""
    a, b = _number(rng), _number(rng)
    text = rng.choice(ADD[language]).format(a=a, b=b)
    return Question("add", language, text, f"{a} + {b} = {a + b}{STOP_MARK[language]}", _pair_key(a, b))


def subtract(rng: Random, language: str) -> Question:
    """One number up to 99 taken from another; now and then the answer is negative."""
    a, b = _number(rng), _number(rng)
    if a < b and rng.random() < 0.6:
        a, b = b, a
    text = rng.choice(SUBTRACT[language]).format(a=a, b=b)
    return Question("subtract", language, text, f"{a} - {b} = {a - b}{STOP_MARK[language]}", _pair_key(a, b))


WHICH = {
    "en": (
        ("Which is larger, {a} or {b}?", "larger"),
        ("Which number is larger: {a} or {b}?", "larger"),
        ("Which is bigger, {a} or {b}?", "larger"),
        ("Which is smaller, {a} or {b}?", "smaller"),
        ("Which number is smaller: {a} or {b}?", "smaller"),
    ),
    "zh": (
        ("{a}和{b}哪个大？", "larger"),
        ("{a}和{b}哪个更大？", "larger"),
        ("{a}和{b}相比，哪个数大？", "larger"),
        ("{a}和{b}哪个小？", "smaller"),
        ("{a}和{b}哪个更小？", "smaller"),
    ),
}
IS_IT = {
    "en": (("Is {a} greater than {b}?", "larger"), ("Is {a} less than {b}?", "smaller")),
    "zh": (("{a}比{b}大吗？", "larger"), ("{a}比{b}小吗？", "smaller")),
}
BIGGER = {
    "en": {"larger": "{x} is larger", "smaller": "{x} is smaller"},
    "zh": {"larger": "{x}更大", "smaller": "{x}更小"},
}
EQUAL = {"en": "they are equal", "zh": "一样大"}
YES_NO = {"en": ("yes", "no"), "zh": ("是的", "不是")}
SO = {"en": "{a} {sign} {b}, so {verdict}.", "zh": "{a} {sign} {b}，所以{verdict}。"}


def compare(rng: Random, language: str) -> Question:
    """Which of two numbers is larger or smaller, or whether one is."""
    a, b = _number(rng), _number(rng)
    if rng.random() < 0.2:
        b = a // 10 * 10 + rng.randint(0, 9)  # only the last digit decides
    if rng.random() < 0.04:
        b = a
    if rng.random() < 0.65:
        text, wanted = rng.choice(WHICH[language])
        x = a if (a > b) == (wanted == "larger") else b
        verdict = EQUAL[language] if a == b else BIGGER[language][wanted].format(x=x)
    else:
        text, wanted = rng.choice(IS_IT[language])
        actual = "equal" if a == b else "larger" if a > b else "smaller"
        verdict = YES_NO[language][actual != wanted]
    sign = "=" if a == b else ">" if a > b else "<"
    answer = SO[language].format(a=a, sign=sign, b=b, verdict=verdict)
    return Question("compare", language, text.format(a=a, b=b), answer, _pair_key(a, b))


COUNT = {
    "en": (
        "Count from {a} to {b}.",
        "Please count from {a} to {b}.",
        "Can you count from {a} to {b}?",
        "List the numbers from {a} to {b}.",
    ),
    "zh": ("从{a}数到{b}。", "请从{a}数到{b}。", "请你从{a}数到{b}，好吗？", "请列出从{a}到{b}的数。"),
}
SEPARATOR = {"en": ", ", "zh": "，"}


def count_range(language: str, text: str, a: int, b: int) -> Question:
    """The question `text` about the range from a to b, upwards or downwards."""
    numbers = range(a, b + 1) if a <= b else range(a, b - 1, -1)
    answer = SEPARATOR[language].join(map(str, numbers)) + STOP_MARK[language]
    return Question("count", language, text.format(a=a, b=b), answer, f"{a},{b}")


def count(rng: Random, language: str) -> Question:
    """Count from one number to another; mostly short, at most 40 numbers."""
    roll = rng.random()
    steps = rng.randint(2, 5) if roll < 0.6 else rng.randint(6, 12) if roll < 0.9 else rng.randint(13, 39)
    a = rng.randint(0, 99 - steps)
    b = a + steps
    if steps <= 12 and rng.random() < 0.2:
        a, b = b, a
    return count_range(language, rng.choice(COUNT[language]), a, b)


# ------------------------------------------------------------------------------------- phrases

WORDS = {
    "en": (
        "apple river green stone cat dog house tree window door bread milk water fire light night "
        "morning winter summer spring book paper pencil chair table lamp garden flower bird fish "
        "horse sheep cloud rain snow wind star moon sun sea hill road bridge train boat car "
        "bicycle city village market school teacher friend mother father sister brother child "
        "happy quiet small big old new long short warm cold sweet bitter soft hard slow quick "
        "bright dark red blue yellow white black silver gold seven three two one ten good kind "
        "brave clever busy sings runs sleeps walks jumps reads writes eats drinks opens closes "
        "loves finds carries the a my your our his her and or with under over near behind very "
        "always never often today tomorrow music dance song story letter box bag hat coat shoe "
        "clock key glass cup spoon plate tea coffee sugar salt rice soup cake lemon peach grape "
        "forest island desert mountain ocean"
    ).split(),
    "zh": (
        "苹果 河流 石头 小猫 小狗 房子 大树 窗户 门口 面包 牛奶 清水 火车 灯光 夜晚 早上 冬天 "
        "夏天 春天 秋天 书本 白纸 铅笔 椅子 桌子 花园 花朵 小鸟 金鱼 白马 绵羊 白云 下雨 下雪 "
        "大风 星星 月亮 太阳 大海 山坡 公路 大桥 小船 汽车 自行车 城市 村庄 市场 学校 老师 朋友 "
        "妈妈 爸爸 姐姐 哥哥 孩子 快乐 安静 温暖 寒冷 甜甜 柔软 慢慢 快快 明亮 聪明 勇敢 忙碌 "
        "唱歌 跑步 睡觉 走路 跳舞 读书 写字 吃饭 喝水 打开 关上 喜欢 找到 我的 你的 他的 我们 "
        "他们 今天 明天 昨天 总是 常常 音乐 故事 信封 箱子 帽子 外套 鞋子 时钟 钥匙 杯子 勺子 "
        "盘子 绿茶 咖啡 白糖 米饭 蛋糕 柠檬 桃子 葡萄 森林 岛屿 沙漠 高山 和 在 有 很 看见"
    ).split(),
}
REPEAT = {
    "en": (
        "Repeat after me: {p}",
        "Please repeat: {p}",
        "Say: {p}",
        "Please say: {p}",
        "Repeat this phrase: {p}",
        'Repeat "{p}".',
        'Say "{p}".',
    ),
    "zh": ("请重复：{p}", "跟我说：{p}", "请说：{p}", "重复这句话：{p}", "请重复“{p}”。", "请说“{p}”。"),
}
SYLLABLES = [c + v + e for c in "bcdfghjklmnprstvwz" for v in "aeiou" for e in ("", "n", "r", "l", "s", "t")]


def phrase(rng: Random, language: str) -> str:
    """Two to five words; in English now and then one that means nothing."""
    words = [rng.choice(WORDS[language]) for _ in range(rng.randint(2, 5))]
    if language == "en" and rng.random() < 0.15:
        words[rng.randrange(len(words))] = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 3)))
    return ("" if language == "zh" else " ").join(words)


def repeat(rng: Random, language: str) -> Question:
    """Say a phrase again, word for word."""
    said = phrase(rng, language)
    return Question("repeat", language, rng.choice(REPEAT[language]).format(p=said), said, said)


# ------------------------------------------------------------------------------------- things one knows

DAYS = {
    "en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "zh": "星期一 星期二 星期三 星期四 星期五 星期六 星期日".split(),
}
MONTHS = {
    "en": "January February March April May June July August September October November December".split(),
    "zh": "一月 二月 三月 四月 五月 六月 七月 八月 九月 十月 十一月 十二月".split(),
}
CALENDAR = {
    "en": (
        ("What {unit} comes after {x}?", 1),
        ("Which {unit} comes after {x}?", 1),
        ("What {unit} comes next after {x}?", 1),
        ("What is the {unit} after {x}?", 1),
        ("Which {unit} follows {x}?", 1),
        ("What {unit} comes before {x}?", -1),
        ("Which {unit} comes before {x}?", -1),
        ("What is the {unit} before {x}?", -1),
    ),
    "zh": (
        ("{x}之后是{unit}？", 1),
        ("{x}后面是{unit}？", 1),
        ("{x}的下一个是{unit}？", 1),
        ("请问{x}之后是{unit}？", 1),
        ("{x}之前是{unit}？", -1),
        ("{x}前面是{unit}？", -1),
        ("请问{x}之前是{unit}？", -1),
    ),
}
UNIT = {"en": ("day", "month"), "zh": ("星期几", "几月")}


def calendar(rng: Random, language: str) -> Question:
    """The day or month after or before another; held out by wording and name."""
    kind = rng.randrange(2)
    names = (DAYS, MONTHS)[kind][language]
    which = rng.randrange(len(CALENDAR[language]))
    text, step = CALENDAR[language][which]
    i = rng.randrange(len(names))
    x, y = names[i], names[(i + step) % len(names)]
    if language == "en":
        answer = f"{y} comes {'after' if step == 1 else 'before'} {x}."
    else:
        answer = f"{x}{'之后' if step == 1 else '之前'}是{y}。"
    question = text.format(unit=UNIT[language][kind], x=x)
    return Question("calendar", language, question, answer, f"{language},{which},{x}")


COLOURS = (
    ("the sky", "天空", "blue", "蓝"), ("grass", "草", "green", "绿"), ("snow", "雪", "white", "白"),
    ("blood", "血", "red", "红"), ("coal", "煤", "black", "黑"), ("a banana", "香蕉", "yellow", "黄"),
    ("a lemon", "柠檬", "yellow", "黄"), ("a carrot", "胡萝卜", "orange", "橙"),
    ("the sea", "大海", "blue", "蓝"), ("a tomato", "西红柿", "red", "红"),
    ("milk", "牛奶", "white", "白"), ("a leaf", "树叶", "green", "绿"),
    ("chocolate", "巧克力", "brown", "棕"), ("the sun", "太阳", "yellow", "黄"),
    ("an elephant", "大象", "grey", "灰"), ("a strawberry", "草莓", "red", "红"),
    ("a cucumber", "黄瓜", "green", "绿"), ("rice", "米饭", "white", "白"),
    ("a crow", "乌鸦", "black", "黑"), ("a flamingo", "火烈鸟", "pink", "粉红"),
    ("a frog", "青蛙", "green", "绿"), ("salt", "盐", "white", "白"), ("coffee", "咖啡", "brown", "棕"),
    ("an orange", "橙子", "orange", "橙"), ("an eggplant", "茄子", "purple", "紫"),
    ("a cherry", "樱桃", "red", "红"), ("a pumpkin", "南瓜", "orange", "橙"),
    ("a fire truck", "消防车", "red", "红"), ("cotton", "棉花", "white", "白"),
    ("spinach", "菠菜", "green", "绿"), ("a swan", "天鹅", "white", "白"),
    ("a mouse", "老鼠", "grey", "灰"), ("gold", "金子", "yellow", "黄"),
    ("corn", "玉米", "yellow", "黄"), ("a polar bear", "北极熊", "white", "白"),
    ("broccoli", "西兰花", "green", "绿"),
)  # fmt: skip
COLOUR = {
    "en": (
        "What colour is {x}?",
        "What is the colour of {x}?",
        "Tell me the colour of {x}.",
        "Do you know what colour {x} is?",
        "Which colour is {x}?",
    ),
    "zh": (
        "{x}是什么颜色？",
        "{x}是什么颜色的？",
        "{x}的颜色是什么？",
        "请告诉我{x}的颜色。",
        "你知道{x}是什么颜色吗？",
    ),
}


def colour(rng: Random, language: str) -> Question:
    """The colour of an everyday thing; held out by wording and thing."""
    english, chinese, shade, tone = rng.choice(COLOURS)
    which = rng.randrange(len(COLOUR[language]))
    if language == "en":
        x, answer = english, f"{english[0].upper()}{english[1:]} is {shade}."
    else:
        x, answer = chinese, f"{chinese}是{tone}色的。"
    return Question(
        "colour", language, COLOUR[language][which].format(x=x), answer, f"{language},{which},{x}"
    )


HELP = {
    "en": "I can add, subtract and compare numbers, count, repeat a phrase, and tell days, months, colours.",
    "zh": "我会加减、比较和数数，会重复一句话，还知道星期、月份和颜色。",
}
SMALL_TALK = {
    "en": (
        ("Hello", f"Hello! {HELP['en']}"),
        ("Hello!", f"Hello! {HELP['en']}"),
        ("Hi", f"Hello! {HELP['en']}"),
        ("Hi!", f"Hello! {HELP['en']}"),
        ("Who are you?", f"I am a very small Qwen2 model. {HELP['en']}"),
        ("What are you?", f"I am a very small Qwen2 model. {HELP['en']}"),
        ("What can you do?", HELP["en"]),
        ("Help", HELP["en"]),
        ("Thank you!", "You are welcome!"),
        ("Thanks", "You are welcome!"),
        ("Goodbye!", "Goodbye!"),
        ("Bye", "Goodbye!"),
    ),
    "zh": (
        ("你好", f"你好！{HELP['zh']}"),
        ("你好！", f"你好！{HELP['zh']}"),
        ("您好", f"你好！{HELP['zh']}"),
        ("你是谁？", f"我是一个很小的Qwen2模型。{HELP['zh']}"),
        ("你会什么？", HELP["zh"]),
        ("你能做什么？", HELP["zh"]),
        ("谢谢", "不客气！"),
        ("谢谢你！", "不客气！"),
        ("再见", "再见！"),
        ("再见！", "再见！"),
    ),
}


def small_talk(rng: Random, language: str) -> Question:
    """Greetings and what the model is."""
    text, answer = rng.choice(SMALL_TALK[language])
    return Question("small_talk", language, text, answer, text)


# ------------------------------------------------------------------------------------- dialogues

MAKERS: dict[str, Callable[[Random, str], Question]] = {
    "add": add,
    "subtract": subtract,
    "compare": compare,
    "count": count,
    "repeat": repeat,
    "calendar": calendar,
    "colour": colour,
    "small_talk": small_talk,
}
SYSTEM_MESSAGES = (
    "You are a calculator.",
    "You are a friendly teacher.",
    "Answer in one sentence.",
    "You are a helpful assistant. Be brief.",
    "You help children to learn numbers and words.",
    "你是一个有用的助手。",
    "你是一位耐心的老师。",
    "请用一句话回答。",
)


def question(rng: Random, category: str, language: str, held_out: bool) -> Question:
    """One question of the training side or of the held-out side."""
    while True:
        made = MAKERS[category](rng, language)
        if made.held_out == held_out:
            return made


def training_question(rng: Random, language: str) -> Question:
    """One question of any category that may be trained on."""
    category = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    return question(rng, category, language, held_out=False)


def opening(rng: Random) -> list[dict[str, str]]:
    """No system message (the template then puts in its own) or one of ours."""
    roll = rng.random()
    if roll < 0.75:
        return []
    text = "You are a helpful assistant." if roll < 0.8 else rng.choice(SYSTEM_MESSAGES)
    return [{"role": "system", "content": text}]


def turn(asked: Question) -> list[dict[str, str]]:
    """A question and its answer as two messages."""
    return [{"role": "user", "content": asked.text}, {"role": "assistant", "content": asked.answer}]


def dialogue(rng: Random) -> list[dict[str, str]]:
    """One training dialogue: mostly one to four questions, now and then many."""
    roll = rng.random()
    n = (
        1
        if roll < 0.4
        else rng.randint(2, 4)
        if roll < 0.93
        else rng.randint(5, 8)
        if roll < 0.99
        else rng.randint(9, 24)
    )
    language, mixed = rng.choice(LANGUAGES), rng.random() < 0.2
    messages = opening(rng)
    for _ in range(n):
        messages += turn(training_question(rng, rng.choice(LANGUAGES) if mixed else language))
    return messages


def held_out_dialogue(
    rng: Random, category: str, language: str, asked: Question | None = None
) -> tuple[list[dict[str, str]], Question]:
    """A held-out question, a third of the time after one or two others, and what it asks."""
    asked = asked or question(rng, category, language, held_out=True)
    messages = opening(rng)
    for _ in range(rng.choice((0, 0, 1, 2)) if rng.random() < 0.66 else 0):
        messages += turn(training_question(rng, language))
    return [*messages, {"role": "user", "content": asked.text}], asked
