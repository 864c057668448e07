//! OpenTelemetry: messages by OTLP/HTTP in JSON, a request a batch, each on a connection of its own.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;

use anyhow::{Context as _, Result, bail, ensure};
use rustls::{ClientConnection, StreamOwned};
use serde_json::Value;

use super::link::{Batch, Socket};
use super::settings::Settings;

/// Bytes of an answer that are read.
const ANSWER_BYTES_MAX: u64 = 64 << 10;
/// Bytes of an answer that a warning shows.
const SHOWN_BYTES_MAX: usize = 200;

/// What a collector did with a batch.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It has it, but for so many messages that it refused.
    Taken {
        /// How many it refused.
        rejected: u64,
        /// Why, in its words.
        why: String,
    },
    /// It will never take it.
    Refused(String),
}

enum Connection {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

/// Sends a batch.
///
/// # Errors
/// The collector is away, or says that it has no time: the batch is to be sent again.
pub(super) fn post(settings: &Settings, batch: &Batch) -> Result<Answer> {
    let (socket, _) = Socket::open(settings)?;
    let mut connection = match socket.tls {
        None => Connection::Plain(socket.tcp),
        Some(tls) => Connection::Tls(Box::new(StreamOwned::new(*tls, socket.tcp))),
    };
    let to = &settings.to;
    let answer = connection
        .ask(&request(settings, batch))
        .with_context(|| format!("no answer from {to}"))?;
    judge(&answer).with_context(|| format!("{to} takes nothing now"))
}

fn request(settings: &Settings, batch: &Batch) -> Vec<u8> {
    let mut body = b"{\"resourceLogs\":[".to_vec();
    for (index, (message, _)) in batch.messages().enumerate() {
        if index > 0 {
            body.push(b',');
        }
        body.extend_from_slice(message);
    }
    body.extend_from_slice(b"]}");
    let to = &settings.to;
    let place = if to.host.contains(':') {
        format!("[{}]:{}", to.host, to.port)
    } else {
        format!("{}:{}", to.host, to.port)
    };
    let mut head = format!(
        "POST {} HTTP/1.1\r\nHost: {place}\r\nUser-Agent: netdump\r\nConnection: close\r\n\
        Content-Type: application/json\r\nContent-Length: {}\r\n",
        to.path,
        body.len()
    );
    for (name, value) in &settings.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    [head.as_bytes(), &body].concat()
}

impl Connection {
    fn ask(&mut self, request: &[u8]) -> io::Result<Vec<u8>> {
        let mut answer = Vec::new();
        let read = match self {
            Self::Plain(tcp) => {
                tcp.write_all(request)?;
                tcp.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)
            }
            Self::Tls(tls) => {
                tls.write_all(request)?;
                tls.flush()?;
                tls.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)
            }
        };
        match read {
            // Many a server just hangs up when it has answered.
            Err(error) if answer.is_empty() => Err(error),
            Ok(_) | Err(_) => Ok(answer),
        }
    }
}

fn judge(answer: &[u8]) -> Result<Answer> {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n");
    let (head, body) = match end {
        Some(end) => (&answer[..end], &answer[end + 4..]),
        None => bail!("it does not speak HTTP: {}", shown(answer)),
    };
    let head = String::from_utf8_lossy(head);
    let mut lines = head.lines();
    let first = lines.next().unwrap_or_default();
    let status: Option<u16> = first
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
    let status = status.with_context(|| format!("it does not speak HTTP: {first:?}"))?;
    let chunked = lines.any(|line| {
        let line = line.to_ascii_lowercase();
        line.starts_with("transfer-encoding:") && line.contains("chunked")
    });
    let body = if chunked {
        dechunked(body)
    } else {
        body.to_vec()
    };
    match status {
        200..=299 => Ok(taken(&body)),
        // The ones that are worth another try, by the specification of OTLP.
        429 | 502 | 503 | 504 => bail!("it answers {status}: {}", shown(&body)),
        _ => Ok(Answer::Refused(format!(
            "it answers {status}: {}",
            shown(&body)
        ))),
    }
}

/// Some records may be refused while the request is not. JSON has 64-bit numbers as texts.
fn taken(body: &[u8]) -> Answer {
    let object: Value = serde_json::from_slice(body).unwrap_or_default();
    let part = &object["partialSuccess"];
    let count = &part["rejectedLogRecords"];
    let text = count.as_str().and_then(|text| text.parse().ok());
    let why = part["errorMessage"].as_str().unwrap_or_default();
    Answer::Taken {
        rejected: count.as_u64().or(text).unwrap_or(0),
        why: shown(why.as_bytes()),
    }
}

/// The contents of chunks, as far as they are whole.
fn dechunked(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    let mut chunk = || -> Option<usize> {
        let end = rest.windows(2).position(|two| two == b"\r\n")?;
        let size = str::from_utf8(&rest[..end]).ok()?;
        let size = size.split(';').next().unwrap_or_default().trim();
        let size = usize::from_str_radix(size, 16).ok()?;
        let begin = end + 2;
        body.extend_from_slice(rest.get(begin..begin.checked_add(size)?)?);
        rest = rest.get(begin + size + 2..)?;
        (size > 0).then_some(size)
    };
    while chunk().is_some() {}
    body
}

fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN_BYTES_MAX)]);
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A request is checked as far as it can be without a collector.
pub(super) fn check(settings: &Settings) -> Result<()> {
    let head = settings.to.path.len() + settings.headers.iter().map(length).sum::<usize>();
    ensure!(
        head <= HEAD_BYTES_MAX,
        "path and headers of {} have {head} bytes, more than the {HEAD_BYTES_MAX} that servers take",
        settings.name
    );
    Ok(())
}

fn length((name, value): (&String, &String)) -> usize {
    name.len() + value.len() + 4
}

/// What servers take of a request's head at least.
const HEAD_BYTES_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_judged_as_the_specification_says() {
        let answer = |text: &str| judge(text.as_bytes());
        let taken = |rejected, why: &str| Answer::Taken {
            rejected,
            why: why.to_owned(),
        };
        assert_eq!(answer("HTTP/1.1 200 OK\r\n\r\n{}").unwrap(), taken(0, ""));
        assert_eq!(
            answer(
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
                 1c;x=y\r\n{\"partialSuccess\":{\"rejected\r\n\
                 27\r\nLogRecords\":\"3\",\"errorMessage\":\"old\"}}\r\n0\r\n\r\n"
            )
            .unwrap(),
            taken(3, "old")
        );
        assert!(matches!(
            answer("HTTP/1.0 400 Bad\r\n\r\nno"),
            Ok(Answer::Refused(why)) if why == "it answers 400: no"
        ));
        for again in ["HTTP/1.1 503 Busy\r\n\r\n", "SSH-2.0-x\r\n\r\n", ""] {
            assert!(answer(again).is_err(), "{again}");
        }
    }

    #[test]
    fn malformed_chunks_end_the_body() {
        for text in ["", "zz\r\n", "5\r\nab", "ffffffffffffffff\r\nab\r\n"] {
            assert!(dechunked(text.as_bytes()).is_empty(), "{text}");
        }
    }
}
