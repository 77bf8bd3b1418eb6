"""Make the corpus of 16 kHz speech and sounds that tiny-audio trains on and is measured with.

Run by ``fetch_audio.sh``, which lays the packages below ``DIR/raw``; needs numpy, av, soxr and hibari-tts, and the
programs flite, espeak-ng and festival. What a voice says is drawn by hash, so that running it again makes the same
files, a smaller share makes a part of them, and a sentence is held out in every voice or in none.
"""

import argparse
import functools
import gzip
import hashlib
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import numpy.typing as npt
import soxr
from hibari import Hibari

RATE = 16000
SHORTEST, LONGEST = 0.25, 10.0  # seconds of a clip
HELD_OUT = 8  # per cent of the sentences and of the sounds
CHUNK = 40  # sentences a worker speaks before it takes others

Samples = npt.NDArray[np.float32]
Rows = list[tuple[str, dict[str, Any]]]  # rows of the manifests, each with the folder it belongs to

# Where clips come from: licence and credit.
PACKAGES = {
    "asterisk-core-sounds-it": ("CC-BY-3.0", "Carlo Flora (voice), Silvia Petrin (text), segreterietelefoniche.it"),
    "asterisk-core-sounds-ru": ("CC-BY-3.0", "Maxim Topal, ivrvoice.ru"),
    "asterisk-core-sounds-en": ("CC-BY-SA-3.0", "Allison Smith, theivrvoice.com; for evaluation, never trained on"),
    "supersonic-scsynth-samples": ("CC0-1.0", "the samples of Sonic Pi"),
    "hibari-tts": ("Apache-2.0", "hibari, Maureese Williams, distilled from Kokoro-82M, hexgrad"),
    "libflite1": ("CMU-Flite", "Flite, Carnegie Mellon University; BSD-like"),
    "festvox-us-slt-hts": ("EST", "CMU ARCTIC slt, Carnegie Mellon University; BSD-like"),
    "festvox-kallpc16k": ("EST", "Alan W Black and Kevin Lenzo; BSD-like"),
    "festvox-kdlpc16k": ("EST", "CSTR, University of Edinburgh; BSD-like"),
    "festvox-ru": ("EST", "Nickolay V. Shmyrev; BSD-like"),
    "espeak-ng": ("free", "eSpeak NG; the GPL of the program does not extend to what it says"),
}


class Sentence(NamedTuple):
    """What is said, and the words whose hash decides whether it is held out."""

    text: str
    key: str


@dataclass(frozen=True)
class Voice:
    """A synthesizer's voice: ``options`` are the program's, ``minutes`` is what it speaks, held-out part included."""

    speaker: str
    program: str
    options: tuple[str, ...]
    language: str
    minutes: float
    package: str


def flite(name: str, shift: float, minutes: float) -> Voice:
    """A flite voice with its pitch multiplied by ``shift``."""
    speaker = f"flite-{name}" + ("" if shift == 1 else f"-{'high' if shift > 1 else 'low'}")
    options = ("-voice", name, "--setf", f"f0_shift={shift}")
    return Voice(speaker, "flite", options, "en", minutes, "libflite1")


def espeak(voice: str, pitch: int, speed: int) -> Voice:
    """An espeak-ng voice and variant, at a pitch of 0 … 99 and a speed in words a minute."""
    options = ("-v", voice, "-p", str(pitch), "-s", str(speed))
    return Voice(f"espeak-{voice.replace('+', '-')}", "espeak-ng", options, voice[:2], 5, "espeak-ng")


def festival(name: str, group: str, minutes: float, package: str) -> Voice:
    """A festival voice of one package."""
    folder = f"{package}/usr/share/festival/voices/{group}/{name}"
    language = "ru" if group == "russian" else "en"
    return Voice(f"festival-{name}", "festival", (name, folder), language, minutes, package)


VOICES = [
    Voice("hibari-heart", "hibari", (), "en", 40, "hibari-tts"),
    flite("slt", 1, 25),
    flite("slt", 1.2, 8),
    flite("slt", 0.82, 6),
    flite("rms", 1, 22),
    flite("rms", 1.35, 8),
    flite("awb", 1, 22),
    flite("awb", 1.35, 8),
    flite("kal16", 1, 8),
    festival("cmu_us_slt_arctic_hts", "us", 8, "festvox-us-slt-hts"),
    festival("ked_diphone", "english", 10, "festvox-kdlpc16k"),
    festival("kal_diphone", "english", 8, "festvox-kallpc16k"),
    festival("msu_ru_nsh_clunits", "russian", 15, "festvox-ru"),
    *(
        espeak(*voice)
        for voice in [
            ("en-us+f1", 55, 160),
            ("en-us+f2", 50, 150),
            ("en-us+f4", 60, 170),
            ("en-us+m2", 45, 160),
            ("en-us+m3", 40, 150),
            ("en-us+m6", 50, 165),
            ("en-gb+f3", 50, 160),
            ("en-gb+m1", 50, 155),
            ("en-gb-x-rp+f5", 60, 160),
            ("en-gb-scotland+m7", 50, 150),
            ("en-029+m5", 45, 160),
            ("it+f3", 50, 150),
            ("it+m2", 45, 155),
            ("ru+f2", 55, 150),
            ("ru+m4", 45, 150),
            ("fr+f4", 50, 155),
            ("fr+m1", 50, 150),
            ("es+f1", 55, 155),
            ("es+m7", 45, 155),
            ("de+f5", 50, 150),
            ("de+m3", 45, 150),
        ]
    ),
]

# Everyday sentences: {slots} are filled from the words of the same language, drawn at random.
TEMPLATES: dict[str, list[str]] = {
    "en": [
        "Please press {digit} for {thing}.",
        "You have {digit} new messages.",
        "The number is {digit}, {digit}, {digit}, {digit}, {digit}.",
        "Your call will be answered in {digit} minutes.",
        "The {vehicle} to {place} leaves at {digit} {half}.",
        "It is {digit} {half} on {day}.",
        "We will meet on {day}, the {ordinal} of {month}.",
        "Can you {act} before {day}?",
        "{name} would like to {act}.",
        "Please {act}, then press the {ordinal} key.",
        "Turn {side} after the {ordinal} street.",
        "{name} and {name} went to {place} in {month}.",
        "I don't think that {name} can {act}.",
        "Where is the {vehicle} to {place}?",
        "How much is {thing} in {place}?",
        "Thank you, {name}, and goodbye!",
    ],
    "it": [
        "Il numero è {digit}, {digit}, {digit}, {digit}.",
        "Ci vediamo {day} alle {digit}.",
        "Vorrei {act}, per favore.",
        "{name} e {name} vanno a {place}.",
        "Il treno per {place} parte alle {digit}.",
        "Hai {digit} nuovi messaggi da {name}.",
        "Non posso {act} prima di {day}.",
        "Quanto costa {thing} a {place}?",
    ],
    "ru": [
        "Номер телефона: {digit}, {digit}, {digit}, {digit}.",
        "Поезд в город {place} уходит в {day}.",
        "Я хочу {act} сегодня вечером.",
        "Нажмите клавишу {digit}, чтобы {act}.",
        "Меня зовут {name}, а её зовут {name}.",
        "Мы не можем {act} до завтра.",
        "Сколько стоит {thing} в магазине?",
        "{name} говорит, что нужно {act}.",
    ],
    "fr": [
        "Le numéro est {digit}, {digit}, {digit}, {digit}.",
        "Nous partons pour {place} {day} matin.",
        "Je voudrais {act}, s'il vous plaît.",
        "{name} et {name} habitent à {place}.",
        "Le train pour {place} part à {digit} heures.",
        "Vous avez {digit} messages de {name}.",
        "Combien coûte {thing} à {place}?",
        "Il faut {act} avant {day}.",
    ],
    "es": [
        "El número es {digit}, {digit}, {digit}, {digit}.",
        "Nos vemos el {day} por la tarde.",
        "Quiero {act}, por favor.",
        "{name} y {name} viven en {place}.",
        "El tren para {place} sale a las {digit}.",
        "Tiene {digit} mensajes nuevos de {name}.",
        "¿Cuánto cuesta {thing} en {place}?",
        "Hay que {act} antes del {day}.",
    ],
    "de": [
        "Die Nummer ist {digit}, {digit}, {digit}, {digit}.",
        "Wir sehen uns am {day} um {digit}.",
        "Ich möchte bitte {act}.",
        "{name} und {name} wohnen in {place}.",
        "Der Zug nach {place} fährt um {digit} Uhr.",
        "Sie haben {digit} neue Nachrichten von {name}.",
        "Was kostet {thing} in {place}?",
        "Am {day} wollen wir {act}.",
    ],
}
WORDS: dict[str, dict[str, str]] = {
    "en": {
        "digit": "two three four five six seven eight nine ten eleven twelve",
        "half": "in_the_morning in_the_evening o'clock fifteen thirty forty-five",
        "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        "month": "January February March April May June July August September October November December",
        "ordinal": "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth",
        "thing": "sales the_directory a_cup_of_tea technical_support a_ticket the_weather fresh_bread your_mailbox",
        "vehicle": "train bus ferry plane night_train",
        "place": "London Chicago the_station the_airport Boston the_old_market Vienna the_harbour",
        "act": "leave_a_message close_the_window call_me_back wash_the_dishes enter_your_password read_the_letter "
        "wait_for_the_tone feed_the_cat change_the_wheel pay_the_bill find_a_good_doctor water_the_flowers",
        "name": "Anna George Julia Martin Victoria Philip Shirley Hugh Zoe Thomas",
        "side": "left right",
    },
    "it": {
        "digit": "due tre quattro cinque sei sette otto nove dieci undici",
        "day": "lunedì martedì mercoledì giovedì venerdì sabato domenica",
        "act": "lasciare_un_messaggio chiudere_la_finestra richiamare comprare_il_pane leggere_il_giornale "
        "aspettare_qui pagare_il_conto cambiare_la_gomma",
        "name": "Giulia Marco Chiara Lorenzo Francesca Giuseppe",
        "place": "Roma Milano Firenze Bologna Perugia Genova",
        "thing": "un_caffè il_biglietto una_bottiglia_d'acqua il_giornale la_camera",
    },
    "ru": {
        "digit": "один два три четыре пять шесть семь восемь девять десять",
        "day": "понедельник вторник среду четверг пятницу субботу воскресенье",
        "act": "оставить_сообщение закрыть_окно позвонить_домой купить_хлеб прочитать_письмо подождать_ответа "
        "сварить_кофе найти_ключи",
        "name": "Анна Сергей Наташа Дмитрий Ольга Юрий",
        "place": "Москва Казань Тверь Омск Псков",
        "thing": "билет чашка_чая свежий_хлеб эта_книга новый_телефон",
    },
    "fr": {
        "digit": "deux trois quatre cinq six sept huit neuf dix onze",
        "day": "lundi mardi mercredi jeudi vendredi samedi dimanche",
        "act": "laisser_un_message fermer_la_fenêtre rappeler_demain acheter_du_pain lire_le_journal payer_la_facture",
        "name": "Camille Julien Hélène Antoine Sophie Guillaume",
        "place": "Paris Lyon Bordeaux Toulouse Strasbourg Genève",
        "thing": "un_café le_billet une_bouteille_d'eau ce_livre la_chambre",
    },
    "es": {
        "digit": "dos tres cuatro cinco seis siete ocho nueve diez once",
        "day": "lunes martes miércoles jueves viernes sábado domingo",
        "act": "dejar_un_mensaje cerrar_la_ventana llamar_mañana comprar_pan leer_el_periódico pagar_la_cuenta",
        "name": "Lucía Javier Carmen Alejandro Beatriz Ignacio",
        "place": "Madrid Sevilla Zaragoza Bilbao Valencia Granada",
        "thing": "un_café el_billete una_botella_de_agua este_libro la_habitación",
    },
    "de": {
        "digit": "zwei drei vier fünf sechs sieben acht neun zehn elf",
        "day": "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag",
        "act": "eine_Nachricht_hinterlassen das_Fenster_schließen morgen_anrufen Brot_kaufen die_Zeitung_lesen "
        "die_Rechnung_bezahlen",
        "name": "Johanna Jürgen Katharina Michael Ulrike Götz",
        "place": "Berlin München Köln Leipzig Freiburg Zürich",
        "thing": "ein_Kaffee die_Fahrkarte eine_Flasche_Wasser dieses_Buch das_Zimmer",
    },
}


def plain(text: str) -> str:
    """A text's words, in lower case."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def order_of(text: str) -> int:
    """A number that looks random and is always the same for a text."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def split_of(key: str) -> str:
    """The folder that a sentence or sound belongs to."""
    return "heldout" if order_of(key) % 100 < HELD_OUT else "train"


def wordnet(folder: Path) -> list[str]:
    """The examples of WordNet's glosses that are 3 to 10 plain words."""
    found = set()
    for part in ("noun", "verb", "adj", "adv"):
        for example in re.findall(r'"([^"]+)"', (folder / f"data.{part}").read_text("utf-8")):
            if re.fullmatch(r"[A-Za-z][A-Za-z ,'-]+[.!?]?", example) and 3 <= len(example.split()) <= 10:
                found.add(example)
    return sorted(found)


def everyday(language: str, count: int) -> list[str]:
    """Sentences from the templates, without repetitions."""
    rng = random.Random(language)
    words = {slot: line.split() for slot, line in WORDS[language].items()}
    found: dict[str, None] = {}
    for _ in range(count):
        template = rng.choice(TEMPLATES[language])
        text = re.sub(r"{(\w+)}", lambda slot: rng.choice(words[slot[1]]).replace("_", " "), template)
        found[text[0].upper() + text[1:]] = None
    return list(found)


def transcripts(raw: Path, language: str) -> dict[str, str]:
    """What the asterisk prompts say, by the name of the prompt."""
    found = {}
    for path in sorted(raw.glob(f"asterisk-core-sounds-{language}/usr/share/doc/*/core-sounds-*.txt.gz")):
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            name, colon, text = line.strip().partition(":")
            if colon and not name.startswith(";"):
                found[name.strip()] = " ".join(text.split())
    return found


def prompts(raw: Path, language: str) -> dict[str, Sentence]:
    """The spoken asterisk prompts; those that say the same, in their language or in English, share a key."""
    english = transcripts(raw, "en")
    keys: dict[str, str] = {}
    found = {}
    for name, text in transcripts(raw, language).items():
        if re.match(r"\w", text) and not name.startswith("silence/") and not re.match(".{0,30}beep", text):
            found[name] = Sentence(text, keys.setdefault(plain(text), plain(english.get(name, "")) or name))
    return found


def sentences(raw: Path) -> dict[str, list[Sentence]]:
    """What the voices of each language may say."""
    found: dict[str, list[Sentence]] = {}
    for language in TEMPLATES:
        texts = everyday(language, 4000 if language == "en" else 1200)
        if language == "en":
            texts += wordnet(raw / "wordnet-base/usr/share/wordnet")
        found[language] = [Sentence(text, plain(text)) for text in texts]
    for language in ("it", "ru"):
        for sentence in prompts(raw, language).values():
            if 3 <= len(sentence.text.split()) <= 14 and not re.search(r'["\\<(\[]', sentence.text):
                found[language].append(sentence)
    return found


def run(*command: str) -> None:
    """Run a synthesizer quietly, and stop with what it says if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {(done.stderr or done.stdout).strip() or done.returncode}")


def speak_festival(voice: Voice, texts: list[str], raw: Path, folder: Path) -> Iterator[Path]:
    """Have festival speak all texts at once, since it is slow to start."""
    name, place = voice.options
    lines = [f'(voice-location "{name}" "{raw / place}/" "")', f"(voice_{name})"]
    for i, text in enumerate(texts):
        spoken = f"(utt.synth (eval (list 'Utterance 'Text \"{text}\")))"
        # Some Russian words are beyond its rules; the sentence is left out.
        lines.append(f'(unwind-protect (utt.save.wave {spoken} "{folder}/{i}.wav" \'riff) nil)')
    (folder / "speak.scm").write_text("\n".join(lines), "utf-8")
    run("festival", "-b", str(folder / "speak.scm"))
    return (folder / f"{i}.wav" for i in range(len(texts)))


def speak_lines(voice: Voice, texts: list[str], folder: Path) -> Iterator[Path]:
    """Have flite or espeak-ng speak the texts one by one."""
    path = folder / "line.wav"
    for text in texts:
        spoken = ("-t", text, "-o", str(path)) if voice.program == "flite" else ("-w", str(path), text)
        run(voice.program, *voice.options, *spoken)
        yield path


@functools.cache
def hibari() -> Any:
    """The neural synthesizer, loaded once a worker."""
    return Hibari()


def speak(voice: Voice, texts: list[str], raw: Path) -> Iterator[Samples]:
    """Samples of each text, at 16 kHz; none where the voice can't say it."""
    if voice.program == "hibari":
        for text in texts:
            yield soxr.resample(hibari()(text, seed=0), 24000, RATE)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        festival = voice.program == "festival"
        for path in speak_festival(voice, texts, raw, folder) if festival else speak_lines(voice, texts, folder):
            yield decode(path) if path.is_file() else np.zeros(0, np.float32)


def decode(path: Path) -> Samples:
    """An audio file's samples in -1 … 1, mixed to mono, at 16 kHz."""
    with av.open(str(path), format="g722" if path.suffix == ".g722" else None) as container:
        stream = container.streams.audio[0]
        floats = av.AudioResampler(format="fltp")
        frames = [part for frame in container.decode(stream) for part in floats.resample(frame)]
        samples = np.concatenate([frame.to_ndarray().mean(axis=0) for frame in frames])
        return samples if stream.rate == RATE else soxr.resample(samples, stream.rate, RATE)


def write(path: Path, samples: Samples) -> float | None:
    """Write a clip as 16-bit WAV; its seconds, or None if it is too short or too long to keep."""
    seconds = len(samples) / RATE
    if not SHORTEST <= seconds <= LONGEST:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with wave.open(str(temporary), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.clip(np.rint(samples * 32768), -32768, 32767).astype("<i2").tobytes())
    temporary.rename(path)
    return round(seconds, 3)


def row_of(
    path: str, text: str, language: str, speaker: str, kind: str, seconds: float, package: str
) -> dict[str, Any]:
    """A line of the manifest."""
    row = {"path": path, "text": text, "language": language, "speaker": speaker, "kind": kind, "seconds": seconds}
    return row | {"source": package, "license": PACKAGES[package][0]}


def make(job: tuple[Voice, list[Sentence], Path]) -> Rows:
    """Speak the sentences that are not there yet."""
    voice, chunk, out = job
    clips = {}
    for text, key in chunk:
        clips[text] = split_of(key), f"{voice.speaker}/{hashlib.sha256(text.encode()).hexdigest()[:12]}.wav"
    seconds = {}
    for text, (split, name) in clips.items():
        if (out / split / name).exists():
            with wave.open(str(out / split / name)) as file:
                seconds[text] = round(file.getnframes() / RATE, 3)
    wanted = [text for text in clips if text not in seconds]
    for text, samples in zip(wanted, speak(voice, wanted, out / "raw") if wanted else (), strict=True):
        if (length := write(out / clips[text][0] / clips[text][1], samples)) is not None:
            seconds[text] = length
    return [
        (split, row_of(name, text, voice.language, voice.speaker, "made", seconds[text], voice.package))
        for text, (split, name) in clips.items()
        if text in seconds
    ]


def jobs(out: Path, share: float) -> Iterator[tuple[Voice, list[Sentence], Path]]:
    """What each voice has to say, in pieces of work."""
    lines = sentences(out / "raw")
    for voice in VOICES:
        chosen, seconds = [], 0.0
        for sentence in sorted(lines[voice.language], key=lambda s: order_of(voice.speaker + s.text)):
            if seconds >= 60 * voice.minutes * share:
                break
            seconds += 0.4 + len(sentence.text) / 14.5  # about what it takes to say
            chosen.append(sentence)
        for i in range(0, len(chosen), CHUNK):
            yield voice, chosen[i : i + CHUNK], out


def pieces(samples: Samples) -> list[Samples]:
    """Cut a long recording at its quietest moments, into pieces of at most ten seconds."""
    found = []
    step = RATE // 20
    while len(samples) > LONGEST * RATE:
        near = samples[int(5 * RATE) : int(LONGEST * RATE)].reshape(-1, step)
        cut = int(5 * RATE) + step * int((near**2).mean(axis=1).argmin()) + step // 2
        found.append(samples[:cut])
        samples = samples[cut:]
    return [*found, samples]


def human(out: Path, language: str) -> Rows:
    """The prompts that a person recorded; the English ones go into a folder of their own, those of 1 to 8 seconds."""
    package = f"asterisk-core-sounds-{language}"
    speaker = f"asterisk-{language}"
    (root,) = (out / f"raw/{package}-g722/usr/share/asterisk/sounds").glob(f"{language}*/")
    rows = []
    for name, (text, key) in sorted(prompts(out / "raw", language).items()):
        path = root / f"{name}.g722"
        if not path.is_file():
            continue
        parts = pieces(decode(path))
        if language == "en" and not (len(parts) == 1 and 1 <= len(parts[0]) / RATE <= 8):
            continue
        split = "english" if language == "en" else split_of(key)
        for i, part in enumerate(parts):
            clip = f"{speaker}/{name}{f'-{i + 1}' if len(parts) > 1 else ''}.wav"
            # Nobody wrote down which words are in which piece.
            words = text if len(parts) == 1 else ""
            if (seconds := write(out / split / clip, part)) is not None:
                rows.append((split, row_of(clip, words, language, speaker, "human", seconds, package)))
    return rows


def sounds(out: Path) -> Rows:
    """The sound effects, of long ones the first ten seconds."""
    package = "supersonic-scsynth-samples"
    rows = []
    for path in sorted((out / "raw" / package / "samples").glob("*.flac")):
        split = split_of(path.stem)
        clip = f"sounds/{path.stem}.wav"
        if (seconds := write(out / split / clip, decode(path)[: int(LONGEST * RATE)])) is not None:
            rows.append((split, row_of(clip, plain(path.stem), "", "", "sound", seconds, package)))
    return rows


def write_whole(path: Path, lines: list[str]) -> None:
    """Write a text file, or leave the old one."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text("\n".join(lines) + "\n", "utf-8")
    temporary.rename(path)


def main(out: Path, share: float) -> None:
    """Write train, heldout, english and LICENSES.md below ``out``."""
    if not (out / "raw").is_dir():
        raise RuntimeError(f"{out / 'raw'} is missing; run fetch_audio.sh, which lays the packages there")
    rows = [row for language in ("it", "ru", "en") for row in human(out, language)] + sounds(out)
    with multiprocessing.Pool() as pool:
        for found in pool.imap_unordered(make, jobs(out, share)):
            rows += found
    for folder in ("train", "heldout", "english"):
        listed = sorted((row for split, row in rows if split == folder), key=lambda row: str(row["path"]))
        write_whole(out / folder / "manifest.jsonl", [json.dumps(row, ensure_ascii=False) for row in listed])
        print(f"{out / folder}: {len(listed)} clips, {sum(row['seconds'] for row in listed) / 60:.1f} minutes")
    credits = [f"- {name}: {license}, {credit}" for name, (license, credit) in PACKAGES.items()]
    said = "What the English voices say is partly from WordNet 3.0, Copyright 2006 by Princeton University."
    write_whole(out / "LICENSES.md", ["The clips, by the `source` that the manifests name:", "", *credits, "", said])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make tiny-audio's corpus below DIR, from the packages in DIR/raw.")
    parser.add_argument("dir", type=Path)
    parser.add_argument("share", type=float, nargs="?", default=1.0, help="share of the synthesized minutes to make")
    arguments = parser.parse_args()
    try:
        main(arguments.dir.resolve(), arguments.share)
    except RuntimeError as error:
        sys.exit(f"speak.py: {error}")
