package main

import (
	"errors"
	"fmt"
	"time"

	"sallyport/internal/http1"
)

// LimitsConfig bounds what peers, the workload and the application may send,
// hold and take time for. Zero means the default. What goes beyond is refused
// and counted by reason: sallyport_requests_refused_total and
// sallyport_connections_refused_total.
type LimitsConfig struct {
	// Head is the size of the head of a request or an answer in bytes, 1024 to
	// 1048576. Default 32768; above it 431, and 502 for an answer.
	Head int `yaml:"head"`
	// Headers is the number of its field lines, 10 to 10000. Default 100.
	Headers int `yaml:"headers"`
	// Target is the length of a request target in bytes, at most Head. Default
	// 8192; above it 414.
	Target int `yaml:"target"`
	// HeadTimeout is the time from the first byte of a request to the end of its
	// head, however steadily bytes come. Default 10 s; then 408.
	HeadTimeout time.Duration `yaml:"head_timeout"`
	// IdleTimeout closes a connection that waits for its next request. The pools
	// of peers keep connections for 50 s; less than that costs them handshakes.
	// Default 65 s.
	IdleTimeout time.Duration `yaml:"idle_timeout"`
	// BodyTimeout is how long a body may rest. Default 5 min; then 408.
	BodyTimeout time.Duration `yaml:"body_timeout"`
	// BodyRate is the least average rate of a request body of known length, in
	// bytes a second after 5 s of grace. Default 240; -1 for none; below it 408.
	BodyRate int `yaml:"body_rate"`
	// ChunkedRate is the least rate of a body of unknown length, in bytes a second
	// over every 10 s for which the client keeps us waiting: as it sends a request,
	// below it 408, and as it takes an answer, below it the answer is cut off.
	// Default: none. Leave it out where requests are streams that rest, as in gRPC.
	ChunkedRate int `yaml:"chunked_rate"`
	// WriteTimeout is how long a peer may not read what it asked for. Default
	// 1 min.
	WriteTimeout time.Duration `yaml:"write_timeout"`
	// ResponseTimeout is how long to wait for the head of an answer. Default
	// 1 min; then 504.
	ResponseTimeout time.Duration `yaml:"response_timeout"`
	// HandshakeTimeout bounds a TLS handshake of a peer. Default 10 s.
	HandshakeTimeout time.Duration `yaml:"handshake_timeout"`

	// Connections to one listener. Default 10000; one more is closed at once.
	Connections int `yaml:"connections"`
	// PeerConnections are those that one identity may have to the inbound
	// listener, all its instances together. Default: half of Connections.
	PeerConnections int `yaml:"peer_connections"`
	// Handshakes are the connections whose peer has not proved an identity yet.
	// Default 512; one more closes the one that has taken longest, of the address
	// that has most.
	Handshakes int `yaml:"handshakes"`
	// Calls in flight at one listener. Default 2048; above it, or for one
	// caller above half of it, 503.
	Calls int `yaml:"calls"`

	// RefuseUnderscores answers 400 to a field name with "_". Default: only those
	// are dropped that would be a name with a meaning if "_" were "-".
	RefuseUnderscores bool `yaml:"refuse_underscores"`
	// PathParameters lets ";" stand in paths, for applications that expect it. The
	// application gets the path as it came; rows, rates and records have it without
	// the parameters. Both sidecars on the way must allow it. Default: 400.
	PathParameters bool `yaml:"path_parameters"`
}

// Validate reports every mistake, each by the name of its field.
func (c LimitsConfig) Validate() error {
	var errs []error
	within := func(field string, n, low, high int) {
		if n != 0 && (n < low || n > high) {
			errs = append(errs, fmt.Errorf("limits.%s: %d is not between %d and %d; leave it out for the default", field, n, low, high))
		}
	}
	const least, most = 1 << 10, 1 << 20
	head := c.Head
	if head < least || head > most {
		head = 32 << 10
	}
	within("head", c.Head, least, most)
	within("headers", c.Headers, 10, 10_000)
	within("target", c.Target, 256, head)
	if c.BodyRate != -1 {
		within("body_rate", c.BodyRate, 1, 1<<30)
	}
	within("chunked_rate", c.ChunkedRate, 1, 1<<30)
	within("connections", c.Connections, 1, 1<<20)
	within("peer_connections", c.PeerConnections, 1, 1<<20)
	within("handshakes", c.Handshakes, 1, 1<<20)
	within("calls", c.Calls, 1, 1<<20)
	for _, d := range []struct {
		field string
		d     time.Duration
	}{
		{"head_timeout", c.HeadTimeout}, {"idle_timeout", c.IdleTimeout}, {"body_timeout", c.BodyTimeout},
		{"write_timeout", c.WriteTimeout}, {"response_timeout", c.ResponseTimeout}, {"handshake_timeout", c.HandshakeTimeout},
	} {
		if d.d != 0 && (d.d < 100*time.Millisecond || d.d > 24*time.Hour) {
			errs = append(errs, fmt.Errorf("limits.%s: %s is not between 100ms and 24h; leave it out for the default", d.field, d.d))
		}
	}
	return errors.Join(errs...)
}

// http is the part that concerns messages.
func (c LimitsConfig) http() http1.Limits {
	return http1.Limits{
		Head: c.Head, Headers: c.Headers, Target: c.Target,
		HeadTimeout: c.HeadTimeout, IdleTimeout: c.IdleTimeout, ResponseTimeout: c.ResponseTimeout,
		BodyTimeout: c.BodyTimeout, WriteTimeout: c.WriteTimeout, MinRate: c.BodyRate, ChunkedRate: c.ChunkedRate,
		RefuseUnderscore: c.RefuseUnderscores, AllowParams: c.PathParameters,
	}
}
