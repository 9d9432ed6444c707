# The tags say what is meant; to pin one to what it is today, ask
#   docker buildx imagetools inspect gcr.io/distroless/cc-debian12:nonroot
# for its digest and append it: cc-debian12:nonroot@sha256:…

# bookworm on both sides: the binary is linked against this Debian's glibc.
FROM rust:1.95-bookworm AS builder
WORKDIR /src
COPY . .
# The target folder is a cache mount and gone after this step, hence the copy within it.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --locked --release --bins \
    && mkdir -p /out/bin /out/data /out/worker-data \
    && cp target/release/payment-sim target/release/reservation-worker /out/bin/ \
    && ln -s payment-sim /out/bin/payment-sim-api

FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=builder /out/bin/ /usr/local/bin/
# There is no shell here to make a folder with, and the user must be able to write to it. A volume
# that docker makes for it takes over the owner.
COPY --from=builder --chown=65532:65532 /out/data/ /data/
# reservation-worker's, where that is what the container runs: no volume of it for every payment-sim.
COPY --from=builder --chown=65532:65532 /out/worker-data/ /worker-data/
ENV STORE_URL=file:/data \
    WORKER_STATE=file:/worker-data/state \
    BIND_ADDRESS=0.0.0.0
# By number: Kubernetes' runAsNonRoot cannot judge a name.
USER 65532:65532
VOLUME /data
EXPOSE 8030 8031
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s --retries=3 \
    CMD ["/usr/local/bin/payment-sim", "healthcheck"]
ENTRYPOINT ["/usr/local/bin/payment-sim"]
