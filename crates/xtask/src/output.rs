//! What people see while they wait: one line per long step on standard error, with its time when it
//! ends.
//!
//! Standard output stays free for results, so that `--json` can be piped.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// A long piece of work under way; dropping it prints how long it took.
pub(crate) struct Step {
    words: String,
    started: Instant,
    spinner: Option<ProgressBar>,
}

/// Announces `words` and times the work until the returned value is dropped.
pub(crate) fn step(words: impl Into<String>) -> Step {
    let words = words.into();
    let spinner = std::io::stderr().is_terminal().then(|| spinner(&words));
    if spinner.is_none() {
        eprintln!("{words} ...");
    }
    Step {
        words,
        started: Instant::now(),
        spinner,
    }
}

/// Many pieces of work of about the same length, counted as they end; dropping it prints how long all
/// took.
pub(crate) struct Steps {
    words: String,
    started: Instant,
    bar: ProgressBar,
}

/// Announces `count` pieces of work under `words`.
pub(crate) fn steps(words: impl Into<String>, count: u64) -> Steps {
    let bar = if std::io::stderr().is_terminal() {
        ProgressBar::new(count)
    } else {
        ProgressBar::hidden()
    };
    let style = "{msg} [{bar:20}] {pos} of {len}, {elapsed}, {eta} to go";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style.progress_chars("=> "));
    }
    Steps {
        words: words.into(),
        started: Instant::now(),
        bar,
    }
}

impl Steps {
    /// Says what the next piece is.
    pub(crate) fn begin(&self, words: &str) {
        self.bar.set_message(format!("{}: {words}", self.words));
        if self.bar.is_hidden() {
            eprintln!("{}: {words} ...", self.words);
        }
    }

    /// The piece is done.
    pub(crate) fn end(&self) {
        self.bar.inc(1);
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        eprintln!("{} ({})", self.words, seconds(self.started.elapsed()));
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
        }
        eprintln!("{} ({})", self.words, seconds(self.started.elapsed()));
    }
}

/// A duration the way people read it: `0.4 s`, `12 s`, `3 min 05 s`.
pub(crate) fn seconds(time: Duration) -> String {
    match time.as_secs() {
        0..10 => format!("{:.1} s", time.as_secs_f64()),
        whole @ 10..120 => format!("{whole} s"),
        whole => format!("{} min {:02} s", whole / 60, whole % 60),
    }
}

/// A text table: the first row is the heading, columns are as wide as their widest cell.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..columns)
        .map(|column| width(column).unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in rows {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, &width)| format!("{cell:<width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn spinner(words: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(words.to_owned());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        bar.set_style(style.tick_strings(&["-", "\\", "|", "/"]));
    }
    bar.enable_steady_tick(Duration::from_millis(150));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        assert_eq!(seconds(Duration::from_millis(412)), "0.4 s");
        assert_eq!(seconds(Duration::from_secs(12)), "12 s");
        assert_eq!(seconds(Duration::from_secs(185)), "3 min 05 s");
    }

    #[test]
    fn a_table_lines_up() {
        let rows = [
            vec!["what".into(), "n".into()],
            vec!["longest".into(), "12".into()],
        ];
        assert_eq!(table(&rows), "what     n\nlongest  12\n");
    }
}
