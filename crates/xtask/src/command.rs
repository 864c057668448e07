//! Running other programs, with errors that name the program and what it said.

use std::io::{BufRead as _, BufReader, stderr};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// Runs a program whose output is for people: all of it goes to standard error.
///
/// # Errors
/// It cannot be started or does not succeed.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .stdout(stderr())
        .status()
        .with_context(|| format!("cannot start {}", words(command)))?;
    if !status.success() {
        bail!(
            "{} ended with {status}; its messages are above",
            words(command)
        );
    }
    Ok(())
}

/// Runs a program whose standard output is this one's.
///
/// # Errors
/// It cannot be started or does not succeed.
pub(crate) fn pass(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot start {}", words(command)))?;
    if !status.success() {
        bail!(
            "{} ended with {status}; its messages are above",
            words(command)
        );
    }
    Ok(())
}

/// Runs a program and returns its standard output.
///
/// # Errors
/// It cannot be started, does not succeed (its messages are in the error) or does not print UTF-8.
pub(crate) fn capture(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", words(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr)
            .trim()
            .replace('\n', "; ");
        bail!("{} ended with {}: {said}", words(command), output.status);
    }
    let name = words(command);
    String::from_utf8(output.stdout).with_context(|| format!("{name} did not print UTF-8"))
}

/// Runs a program, shows its standard output on standard error as it comes, and returns it with
/// whether the program succeeded.
///
/// # Errors
/// It cannot be started or does not print UTF-8.
pub(crate) fn tee(command: &mut Command) -> Result<(bool, String)> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", words(command)))?;
    let output = child
        .stdout
        .take()
        .with_context(|| format!("{} has no output", words(command)))?;
    let mut text = String::new();
    for line in BufReader::new(output).lines() {
        let line = line.with_context(|| format!("{} did not print UTF-8", words(command)))?;
        eprintln!("{line}");
        text.push_str(&line);
        text.push('\n');
    }
    let status = child
        .wait()
        .with_context(|| format!("cannot wait for {}", words(command)))?;
    Ok((status.success(), text))
}

/// The command as a person would type it, shortened where it gets long.
pub(crate) fn words(command: &Command) -> String {
    const SHOWN_CHARS_MAX: usize = 160;
    let mut words = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        words.push(' ');
        words.push_str(&argument.to_string_lossy());
    }
    match words.char_indices().nth(SHOWN_CHARS_MAX) {
        Some((end, _)) => format!("`{} ...`", words.get(..end).unwrap_or_default()),
        None => format!("`{words}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_carries_what_the_program_said() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo first >&2; echo second >&2; exit 3"]);
        let error = capture(&mut command).unwrap_err().to_string();
        assert!(error.contains("exit status: 3: first; second"), "{error}");
    }

    #[test]
    fn a_long_command_is_cut() {
        let mut command = Command::new("x");
        command.arg("y".repeat(500));
        assert!(words(&command).len() < 200);
    }
}
