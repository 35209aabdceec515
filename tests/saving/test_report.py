# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The report of a run: made by training itself, of whatever is there, and looked at in a real browser."""

import json
import re
import shutil

import pytest
import yaml
from conftest import DEMO_PROMPTS, MARKUP, make_trainer
from PIL import Image

from rdm_trl import RdmDistillConfig, callbacks, cli
from rdm_trl.guardrails import drift_warnings
from rdm_trl.saving import report
from rdm_trl.saving.pictures import card_picture, comparison_grid, read_grid, save_grid


get_plotlyjs = pytest.importorskip("plotly.offline", reason='needs plotly: pip install "rdm_trl[report]"').get_plotlyjs
LIMIT = 15 * 2**20


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.+?)</script>', page)[1])


def history(number: int, **last) -> list[dict]:
    rows = [{"step": i, "loss": 0.1, "x0/std": 1.0, "x0/diversity": 0.5, "dm/fake_error": 1.0} for i in range(number)]
    rows[-1] |= last
    return rows


def write_run(folder, rows=None, **files):
    folder.mkdir(parents=True, exist_ok=True)
    if rows is not None:
        state = {"global_step": len(rows), "max_steps": len(rows), "log_history": rows}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def make_grid(prompts, color="red", shape=(16, 24)) -> Image.Image:
    images = [[Image.new("RGB", shape, color)] * 2 for _ in prompts]
    return comparison_grid({f"{who}, 4 steps": images for who in ("teacher", "base", "student")}, prompts)


# ------------------------------------------------------------------------------------------------------------ the page


def test_training_leaves_a_report_that_needs_nothing_else(finished_run):
    page = (finished_run / "report.html").read_text(encoding="utf-8")
    assert page.count(get_plotlyjs()) == 1
    assert len(page) < LIMIT
    own = page.replace(report_script(page), "")
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", own)
    data = data_of(page)
    assert data["samples"]["prompts"] == [DEMO_PROMPTS[0], MARKUP]
    assert list(data["samples"]["students"][0]["steps"]) == ["2", "4"]
    assert [one["who"] for one in data["samples"]["constant"]] == ["teacher", "base"]
    drawn = {chart["key"]: chart for chart in data["guardrails"]}
    assert {"x0/std", "x0/diversity", "dm/direction", "dm/fake_error", "loss/fake"} <= drawn.keys()
    first = drawn["x0/std"]["lines"][0]["y"][0]
    assert drawn["x0/std"]["lines"][0]["band"] == [0.67 * first, 1.5 * first]
    assert drawn["dm/fake_error"]["lines"][0]["band"] is None
    assert {chart["key"] for chart in data["evaluations"]} >= {"eval_fid", "eval_fid_teacher", "eval_redness"}
    assert [len(chart["paths"][0]["x"]) for chart in data["trades"]] == [3]  # two on the way and one behind
    for text in ("<b>bold</b>", "{{ 1 }}</", "Infinity"):
        assert text not in own


def report_script(page: str) -> str:
    """Plotly."""
    return max(re.findall(r"<script>.*?</script>", page, re.S), key=len)


def test_prompts_and_settings_are_escaped(tmp_path):
    settings = {"base_model": MARKUP, "reward_funcs": [MARKUP], "sample_num_steps": 4}
    run = write_run(tmp_path / "a", history(3), metrics=json.dumps({"settings": settings, "note": MARKUP}))
    (run / "samples").mkdir()
    save_grid(make_grid([MARKUP]), run / "samples" / "step-000003.png")
    page = report.write_report([run]).read_text(encoding="utf-8")
    assert "<b>bold" not in page and "&lt;b&gt;bold" in page
    assert data_of(page)["samples"]["prompts"] == [MARKUP]


def test_warnings_stand_where_they_were_raised(tmp_path):
    rows = history(700)
    for row in rows[400:]:
        row["x0/diversity"] = 0.1
    for row in rows[500:]:
        row["dm/fake_error"] = 50.0
    assert {key: row["step"] for key, (row, _) in drift_warnings(rows).items()} == {
        "x0/diversity": 400,
        "dm/fake_error": 502,
    }
    page = report.write_report([write_run(tmp_path, rows)]).read_text(encoding="utf-8")
    charts = {chart["key"]: chart["lines"][0] for chart in data_of(page)["guardrails"]}
    assert charts["x0/diversity"]["warning"]["x"] == 400 and charts["x0/std"]["warning"] is None
    assert len(charts["x0/std"]["x"]) <= report.MOST_POINTS and charts["x0/std"]["x"][-1] == 699
    assert "x0/diversity is 0.1 at step 400" in page


def test_the_file_repeats_the_run(finished_run):
    settings = json.loads((finished_run / "metrics.json").read_text())["settings"]
    written = yaml.safe_load(report.run_file(settings))
    assert written["lora_r"] == 2
    options = {name: written[name] for name in written if name in RdmDistillConfig.__dataclass_fields__}
    config = RdmDistillConfig("elsewhere", **{**options, "reward_funcs": None})
    for name, value in settings.items():
        if name in RdmDistillConfig.__dataclass_fields__ and name != "reward_funcs":
            assert getattr(config, name) == value, name


# -------------------------------------------------------------------------------------------------- whatever is there


@pytest.mark.parametrize("damage", ["empty", "cut", "types", "pictures", "numbers", "killed"])
def test_a_broken_run_makes_a_page_all_the_same(damage, finished_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    if damage != "empty":
        shutil.copytree(finished_run, run, dirs_exist_ok=True)
    if damage == "cut":
        for name in ("metrics.json", "trainer_state.json"):
            text = (run / name).read_text()
            (run / name).write_text(text[: len(text) // 2])
    if damage == "types":
        write_run(run, metrics='{"student": [1], "settings": 3, "cost": null}', trainer_state='{"log_history": {}}')
    if damage == "pictures":
        content = (run / "samples" / "step-000002.png").read_bytes()
        (run / "samples" / "step-000002.png").write_bytes(content[: len(content) // 2])
        (run / "samples" / "step-x.png").write_bytes(b"")
        Image.new("RGB", (8, 8)).save(run / "samples" / "step-000003.png")  # says nothing of itself
    if damage == "numbers":
        state = '{"log_history": [{"step": 1, "x0/std": NaN}, {"step": 2, "x0/std": "1"}, {"x0/std": 1}, 5]}'
        (run / "trainer_state.json").write_text(state)
    if damage == "killed":
        (run / "checkpoint-3").mkdir()
        shutil.move(run / "trainer_state.json", run / "checkpoint-3")
        (run / "metrics.json").unlink()
    page = report.write_report([run]).read_text(encoding="utf-8")
    data = data_of(page)
    said = {
        "empty": ["no metrics.json", "no trainer_state.json", "no sample grids"],
        "cut": ["metrics.json cannot be read", "trainer_state.json cannot be read"],
        "pictures": ["samples/step-000002.png cannot be read"],
        "killed": ["no metrics.json"],
    }
    for text in said.get(damage, []):
        assert text in page
    assert bool(data["guardrails"]) == (damage in ("pictures", "killed"))
    if damage == "pictures":
        assert list(data["samples"]["students"][0]["steps"]) == ["4"]


def test_grids_without_a_layout_are_shown_whole(tmp_path):
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "samples" / "step-000007.png")
    samples = data_of(report.write_report([tmp_path]).read_text(encoding="utf-8"))["samples"]
    assert list(samples["wholes"][0]["steps"]) == ["7"] and not samples["students"]


def test_large_pictures_do_not_make_a_large_page(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PICTURE_BYTES", 300_000)
    (tmp_path / "samples").mkdir()
    noise = Image.effect_noise((256, 256), 90).convert("RGB")
    for step in range(40):
        columns = {f"{who}, 4 steps": [[noise] * 2] for who in ("teacher", "student")}
        save_grid(comparison_grid(columns, ["a"]), tmp_path / "samples" / f"step-{step:06d}.png")
    page = report.write_report([tmp_path]).read_text(encoding="utf-8")
    steps = list(data_of(page)["samples"]["students"][0]["steps"])
    assert len(steps) == report.MOST_STEPS and steps[0] == "0" and steps[-1] == "39"
    assert report.size_of(data_of(page)["samples"]) <= 300_000


# -------------------------------------------------------------------------------------------------------- several runs


def test_several_runs_stand_side_by_side(finished_run, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    shutil.copytree(finished_run, other)
    metrics = json.loads((other / "metrics.json").read_text())
    metrics["settings"]["dm_normalization"] = "sample"
    (other / "metrics.json").write_text(json.dumps(metrics))
    monkeypatch.chdir(tmp_path)
    cli.main(["report", str(finished_run), str(other)])
    assert capsys.readouterr().out.strip() == "report.html"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    data = data_of(page)
    assert data["runs"] == ["run", "other"] and [one["run"] for one in data["samples"]["students"]] == data["runs"]
    assert len(data["samples"]["constant"]) == 2 and all(len(chart["lines"]) == 2 for chart in data["guardrails"])
    different = page.split("what differs")[1].split("</table>")[0]
    assert re.findall(r"<code>(.+?)</code>", different) == ["dm_normalization"]


def test_runs_of_other_prompts_share_what_they_can(tmp_path):
    for name, prompts in (("a", ["x", "y"]), ("b", ["y", "z"])):
        (tmp_path / name / "samples").mkdir(parents=True)
        save_grid(make_grid(prompts), tmp_path / name / "samples" / "step-000001.png")
    page = report.write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html").read_text(encoding="utf-8")
    assert data_of(page)["samples"]["prompts"] == ["y"] and "other prompts" in page


# ------------------------------------------------------------------------------------------------ never a crash


def test_without_plotly_training_goes_on(tmp_path, monkeypatch, capsys):
    warnings = []
    monkeypatch.setattr(callbacks.logger, "warning", lambda text, *rest: warnings.append(text))
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert sum('pip install "rdm_trl[report]"' in text for text in warnings) == 1
    run = tmp_path / "run"
    assert not (run / "report.html").exists() and (run / "trainer_state.json").exists()  # to make it later
    with pytest.raises(SystemExit, match="2"):
        cli.main(["report", str(run)])
    assert 'pip install "rdm_trl[report]"' in capsys.readouterr().err
    monkeypatch.undo()
    cli.main(["report", str(run)])
    assert data_of((run / "report.html").read_text(encoding="utf-8"))["guardrails"]


def test_a_page_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(callbacks.logger, "warning", lambda text, *rest: warnings.append(text))
    monkeypatch.setattr(callbacks, "write_report", lambda folders: 1 / 0)
    make_trainer(tmp_path).train()
    assert len(warnings) == 1 and "ZeroDivisionError" in warnings[0]


def test_what_is_no_folder(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["report", str(tmp_path / "nowhere")])
    assert "nowhere is not a folder" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("shape", [(64, 64), (80, 120), (120, 80)])
def test_a_grid_is_taken_apart_as_it_was_put_together(shape, tmp_path):
    columns = {
        title: [[Image.new("RGB", shape, (40 * row, 60 * i, 9 * len(title))) for i in range(3)] for row in range(2)]
        for title in ("teacher, 25 steps", "student, 4 steps")
    }
    save_grid(comparison_grid(columns, ["a", MARKUP]), tmp_path / "grid.png")
    read, prompts = read_grid(tmp_path / "grid.png")
    assert prompts == ["a", MARKUP] and read.keys() == columns.keys()
    for title, rows in columns.items():
        for row, images in enumerate(rows):
            for i, image in enumerate(images):
                assert read[title][row][i].size == shape and read[title][row][i].tobytes() == image.tobytes()


def test_the_card_shows_teacher_and_student_with_their_times(finished_run):
    card = (finished_run / "README.md").read_text(encoding="utf-8")
    assert "](samples/card.png)" in card and "[report.html](report.html)" in card
    with Image.open(finished_run / "samples" / "card.png") as picture:
        assert picture.width > picture.height and len(set(picture.convert("L").getdata())) > 50
    seconds = json.loads((finished_run / "metrics.json").read_text())["cost"]["seconds_per_image"]
    assert seconds.keys() == {"teacher", "base", "student"} and min(seconds.values()) > 0
    for count in range(1, 12):
        columns = {f"{who}, 4 steps": [[Image.new("RGB", (8, 12))]] * count for who in ("teacher", "base", "student")}
        assert card_picture(columns, {"teacher": "1 s"}).width > 0


# ------------------------------------------------------------------------------------------------------------- browser


def open_page(browser, file, **options):
    """The page, and what the browser complained of."""
    page, complaints = browser.new_context(**options).new_page(), []
    page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
    page.goto(file.resolve().as_uri())
    page.wait_for_selector("html[data-drawn]")
    return page, complaints


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_a_browser_shows_the_report(width, scheme, browser, finished_run):
    viewport = {"width": width, "height": 800}
    page, complaints = open_page(browser, finished_run / "report.html", viewport=viewport, color_scheme=scheme)
    students = page.locator("figure:not(.teacher):not(.base) img")
    assert students.count() == 2 and page.locator("#step").text_content() == "update 4"
    last = students.nth(0).get_attribute("src")
    page.locator("#slider").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#step").text_content() == "update 2"
    assert students.nth(0).get_attribute("src") != last
    teacher = page.locator("figure.teacher img").nth(0).get_attribute("src")
    page.click("#play")
    page.wait_for_function("document.getElementById('step').textContent === 'update 4'")
    assert students.nth(0).get_attribute("src") == last
    assert page.locator("figure.teacher img").nth(0).get_attribute("src") == teacher
    page.check("#base")
    assert page.locator("figure.base").nth(0).is_visible()
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.locator("article h3").nth(1).text_content() == MARKUP
    charts = page.evaluate("JSON.parse(document.getElementById('data').textContent)")
    number = sum(len(charts[name]) for name in ("guardrails", "evaluations", "trades"))
    assert page.locator(".js-plotly-plot").count() == number > 12
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
    background = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(background)
    page.click("#theme")
    assert page.evaluate(background) != before
    assert complaints == []
    page.context.close()


def test_a_browser_shows_a_broken_run_and_hundreds_of_steps(browser, tmp_path):
    rows = history(900)
    rows[450] |= {"x0/std": 9.0}
    rows[451] |= {"x0/std": float("nan")}
    write_run(tmp_path, rows, metrics="{")
    page, complaints = open_page(browser, report.write_report([tmp_path]))
    assert page.locator(".notice:not(.mild)").count() == 1 and complaints == []
    page.context.close()
