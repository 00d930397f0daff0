"""What the page says, in Chinese and in English."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tuwen_web.refusals import Kind


@dataclass(frozen=True)
class Labels:
    """One language's. `{}` stands for a number or a name."""

    code: str
    title: str
    query: str
    placeholder: str
    search: str
    by_picture: str
    drop_here: str
    examples: str
    empty: str
    results_of: str
    similar_to: str
    your_picture: str
    tags: str
    similar: str
    enlarge: str
    more: str
    took: str
    took_to_rank: str
    truncated: str
    searching: str
    collection: str
    indexing: str
    waiting: str
    retrying: str
    unreachable: str
    too_large: str
    other_language: str
    refusals: Mapping[Kind, str]


ZH = Labels(
    code="zh-CN",
    title="图文搜索",
    query="用中文描述要找的图片",
    placeholder="例如：哭泣的猫",
    search="搜索",
    by_picture="以图搜图",
    drop_here="松开鼠标，用这张图片搜索",
    examples="试试这些",
    empty="输入一句中文，或把图片拖到这里，就能找到相近的图片。点击结果可查看相似图片。",
    results_of="“{}”的结果",
    similar_to="与“{}”相似的图片",
    your_picture="与上传图片相似的图片",
    tags="最贴切的名称",
    similar="查找与“{}”相似的图片",
    enlarge="查看“{}”的大图",
    more="显示更多",
    took="编码 {} 毫秒 · 排序 {} 毫秒",
    took_to_rank="排序 {} 毫秒",
    truncated="查询过长，只用了开头部分。",
    searching="正在搜索…",
    collection="{} 张图片 · 模型 {}",
    indexing="正在准备图片：{} / {}",
    waiting="正在等待模型服务器",
    retrying="稍后会自动重试。",
    unreachable="网页服务没有响应，请稍后再试。",
    too_large="图片太大，最大 {} MiB。",
    other_language="English",
    refusals={
        "refused": "无法搜索",
        "too_large": "图片太大",
        "not_found": "没有这张图片",
        "busy": "现在请求太多",
        "not_ready": "图片还没有准备好",
        "no_server": "模型服务器没有响应",
        "too_slow": "搜索超时",
        "failed": "模型服务器出错",
    },
)
EN = Labels(
    code="en",
    title="Picture search",
    query="Describe a picture in Chinese",
    placeholder="for example 哭泣的猫",
    search="Search",
    by_picture="By picture",
    drop_here="Drop the picture to search with it",
    examples="Try one of these",
    empty="Type a Chinese phrase, or drop a picture here, to find the pictures that match. "
    "Choose a result to see pictures like it.",
    results_of="Results for “{}”",
    similar_to="Pictures like “{}”",
    your_picture="Pictures like yours",
    tags="Names that fit best",
    similar="Pictures like “{}”",
    enlarge="“{}”, enlarged",
    more="Show more",
    took="embedding {} ms · ranking {} ms",
    took_to_rank="ranking {} ms",
    truncated="The query was too long; its beginning was used.",
    searching="Searching…",
    collection="{} pictures · model {}",
    indexing="Preparing the pictures: {} of {}",
    waiting="Waiting for the model server",
    retrying="It will be tried again by itself.",
    unreachable="The search page's own server does not answer. Try again in a moment.",
    too_large="The picture is too large; the limit is {} MiB.",
    other_language="中文",
    refusals={
        "refused": "This cannot be searched",
        "too_large": "The picture is too large",
        "not_found": "There is no such picture",
        "busy": "Too many searches just now",
        "not_ready": "The pictures are not ready yet",
        "no_server": "The model server does not answer",
        "too_slow": "The search took too long",
        "failed": "The model server failed",
    },
)


def choose(asked: str | None, accept_language: str) -> Labels:
    """The language asked for by `lang=`, else Chinese where the browser names it before English."""
    if asked in ("zh", "en"):
        return ZH if asked == "zh" else EN
    for part in accept_language.lower().split(","):
        for labels, prefix in ((ZH, "zh"), (EN, "en")):
            if part.strip().startswith(prefix):
                return labels
    return EN
