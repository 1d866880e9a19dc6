use std::fmt;

use subtle::ConstantTimeEq;

/// The secret that opens the links of one session.
#[derive(Clone)]
pub struct SessionToken([u8; Self::BYTES]);

impl SessionToken {
    /// Length in bytes.
    pub const BYTES: usize = 32;

    /// A token that nobody can guess.
    ///
    /// # Errors
    /// When the kernel gives no randomness.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; Self::BYTES];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// The token that a peer made.
    pub fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes, for the peer alone.
    pub fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }
}

impl PartialEq for SessionToken {
    /// Takes the same time wherever the first difference is.
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for SessionToken {}

impl fmt::Debug for SessionToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionToken(secret)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_holds_no_secret() {
        let token = SessionToken::from_bytes([0x5a; 32]);
        let shown = format!("{token:?}");
        assert_eq!(shown, "SessionToken(secret)");
    }

    #[test]
    fn tokens_are_equal_only_when_every_byte_is() {
        let token = SessionToken::from_bytes([7; 32]);
        for position in 0..32 {
            let mut bytes = [7; 32];
            bytes[position] ^= 1;
            assert_ne!(token, SessionToken::from_bytes(bytes));
        }
        assert_eq!(token, token.clone());
        assert_ne!(SessionToken::random().unwrap(), SessionToken::random().unwrap());
    }
}
