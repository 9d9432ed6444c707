//! Where a webhook goes, as limits, breakers and lists tell receivers apart.

use url::Url;

/// Scheme, host and port, in one spelling: a port that the scheme implies is the same as none.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin {
    pub scheme: String,
    pub host: String,
    pub port: u16,
}

/// `None` where there is nothing to connect to: the attempt itself refuses such a URL.
pub fn origin(url: &str) -> Option<Origin> {
    let url = Url::parse(url).ok()?;
    let (host, port) = (url.host_str()?.to_owned(), url.port_or_known_default()?);
    Some(Origin { scheme: url.scheme().to_owned(), host, port })
}

impl Origin {
    /// An origin by itself: `scheme://host`, or with a port, and nothing behind.
    pub fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.split_once("://")?;
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        // The URL parser is as lenient as a browser.
        let strange = |c: char| c.is_whitespace() || c.is_control() || "/?#@\\".contains(c);
        if authority.is_empty() || authority.contains(strange) {
            return None;
        }
        origin(text).filter(|origin| matches!(origin.scheme.as_str(), "http" | "https"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_has_one_spelling() {
        let plain = Origin::parse("https://shop.example").unwrap();
        for same in
            ["https://shop.example/", "HTTPS://Shop.Example:443", "https://shop.example:443/"]
        {
            assert_eq!(Origin::parse(same), Some(plain.clone()), "{same}");
        }
        assert_eq!(origin("https://shop.example/hook?x=1"), Some(plain.clone()));
        for other in ["http://shop.example", "https://shop.example:8443", "https://a.shop.example"]
        {
            assert_ne!(Origin::parse(other).unwrap(), plain, "{other}");
        }
    }

    #[test]
    fn what_is_more_or_less_than_an_origin_is_none() {
        for wrong in [
            "",
            "shop.example",
            "shop.example:80",
            "https:shop.example",
            "https://",
            "ftp://shop.example",
            "https://shop.example/hook",
            "https://shop.example?x",
            "https://shop.example#f",
            "https://me@shop.example",
            "https://@shop.example",
            "https:///shop.example",
            "https://shop.example\n",
            "https://shop.example:99999",
        ] {
            assert_eq!(Origin::parse(wrong), None, "{wrong}");
        }
    }
}
