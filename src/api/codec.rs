pub use tonic_prost::ProstCodec as Codec;
