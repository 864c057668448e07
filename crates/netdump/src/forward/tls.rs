//! TLS to a target: whom it is trusted by, what it is called, and who we are.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use super::settings::Settings;

/// A connection that has yet to begin. The files are read each time, so that a renewed certificate
/// needs no restart.
pub(super) fn connection(settings: &Settings) -> Result<ClientConnection> {
    let name = ServerName::try_from(settings.server_name.clone())
        .with_context(|| format!("{:?} is no server name", settings.server_name))?;
    let config = Arc::new(config(settings)?);
    ClientConnection::new(config, name).context("cannot begin TLS")
}

/// What [`connection`] needs; also read when the server starts, to tell what is wrong with it then.
pub(super) fn config(settings: &Settings) -> Result<ClientConfig> {
    let ca = settings.ca.display();
    let mut roots = RootCertStore::empty();
    let certificates =
        CertificateDer::pem_file_iter(&settings.ca).with_context(|| format!("cannot read {ca}"))?;
    for certificate in certificates {
        let certificate = certificate.with_context(|| format!("{ca} is not PEM"))?;
        // One of many that is of a kind that nobody uses any more is no reason to trust none.
        drop(roots.add(certificate));
    }
    ensure!(
        !roots.is_empty(),
        "{ca} has no certificate of an authority: name the file with \"ca\""
    );
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .context("TLS lacks all versions")?
        .with_root_certificates(roots);
    let Some((certificate, key)) = &settings.identity else {
        return Ok(config.with_no_client_auth());
    };
    let (show, show_key) = (certificate.display(), key.display());
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("cannot read the certificate {show}"))?;
    let key = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("cannot read the key {show_key}"))?;
    config
        .with_client_auth_cert(chain, key)
        .with_context(|| format!("{show} and {show_key} do not belong together"))
}
