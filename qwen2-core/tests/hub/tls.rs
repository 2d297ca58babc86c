//! Mirrors over https, with certificates that only those trust who are told to.

use serde_json::Value;

use crate::server::{Hub, certificate};

fn message(outcome: &Value) -> &str {
    outcome["message"].as_str().expect("an error")
}

#[test]
fn a_mirror_with_a_certificate_of_its_own_is_trusted_by_the_variable() {
    let authority = certificate("authority.pem");
    let authority = authority.to_str().expect("text");
    for variable in ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"] {
        for id in ["org/tiny-model", "modelscope:org/tiny-model"] {
            let hub = Hub::encrypted("tied");
            assert!(hub.endpoint.starts_with("https://"));
            let outcome = hub.load_id(id, &[(variable, authority)]);
            assert_eq!(outcome["hidden_size"], 32, "{outcome}");
            hub.assert_that_no_file_is_wrong();
            // The weights came from storage under another name, over TLS as well.
            let requests = hub.state().requests.clone();
            assert!(!requests.is_empty());
        }
    }
}

#[test]
fn without_it_nothing_is_fetched_and_the_help_names_it() {
    let hub = Hub::encrypted("tied");
    for environment in [
        &[][..],
        // The server's certificate is no authority's.
        &[("SSL_CERT_FILE", certificate("server.pem"))],
    ] {
        let environment: Vec<_> = environment
            .iter()
            .map(|(name, path)| (*name, path.to_str().expect("text")))
            .collect();
        let outcome = hub.load(&environment);
        assert_eq!(outcome["kind"], "network", "{outcome}");
        assert!(message(&outcome).starts_with("server is not trusted: "));
        assert!(message(&outcome).contains("certificate"), "{outcome}");
        let help = outcome["help"].as_str().expect("help");
        assert!(help.contains("SSL_CERT_FILE"), "{help}");
    }
    assert_eq!(hub.n_requests(), 0);
}

#[test]
fn a_file_without_certificates_is_an_error_of_its_own() {
    let hub = Hub::encrypted("tied");
    let damaged = hub.home.path().join("damaged.pem");
    let text = "-----BEGIN CERTIFICATE-----\n%%%\n-----END CERTIFICATE-----\n";
    std::fs::write(&damaged, text).expect("write");
    for (path, kind) in [
        (hub.home.path().join("nowhere.pem"), "not_found"),
        (hub.home.path().to_owned(), "invalid_file"),
        (certificate("server.key"), "invalid_file"),
        (damaged, "invalid_file"),
    ] {
        let outcome = hub.load(&[("SSL_CERT_FILE", path.to_str().expect("text"))]);
        assert_eq!(outcome["kind"], kind, "{outcome}");
        let start = format!(
            "no certificates to trust: {}: SSL_CERT_FILE",
            path.display()
        );
        assert!(message(&outcome).starts_with(&start), "{outcome}");
        assert!(outcome["help"].as_str().is_some());
    }
    assert_eq!(hub.n_requests(), 0);
}
