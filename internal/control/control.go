// Package control is the wire between the issuer and its proxies: the part of
// the SPIRE Server API that an agent needs, and the Mesh service beside it.
//
// A Server knows its caller from the TLS certificate alone and speaks to the
// issuer's rooms through the interfaces declared here. A Client attests, fetches
// identities and keeps a subscription alive. Neither holds a signing key of an
// authority. Serve, Subscribe and UploadAudit block, and what they start ends
// with them; the goroutines of a connection end with Close.
package control

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Kinds of proxy that may subscribe.
const (
	KindSidecar = "sidecar"
	KindGateway = "gateway"
)

// The path of the issuer's own identity, and what every agent's starts with.
const (
	serverPath  = "/spire/server"
	agentPrefix = "/spire/agent/"
	joinPrefix  = agentPrefix + "join_token/"
)

const (
	// maxMessage bounds a message to a proxy, bytes: a snapshot of 10,000 rules
	// is about 2 MiB, and a gateway has those of everybody. maxRequest bounds one
	// from a proxy, maxAdminMessage one to the operator, who lists everything.
	maxMessage      = 32 << 20
	maxRequest      = 2 << 20
	maxAdminMessage = 64 << 20
	// streamWindow and connWindow are what a peer may send before it is read,
	// bytes. They are fixed: to find better ones by itself, gRPC answers every
	// message with a ping, and a push to thousands costs as many again.
	streamWindow = 256 << 10
	connWindow   = 1 << 20
	// maxStreams bounds the streams of one connection that are open at once.
	maxStreams = 128
	// maxHeader bounds the headers of one call, bytes.
	maxHeader = 64 << 10
	// maxCSR bounds a certificate request, bytes: RSA 8192 needs about 2 KiB.
	maxCSR = 16 << 10
	// maxBatch bounds the SVIDs of one BatchNewX509SVID, as in SPIRE.
	maxBatch = 500
	// maxAuditLine and maxAuditLines bound an AuditBatch. No line of the audit
	// log is longer, however much of it is escaped.
	maxAuditLine  = 72 << 10
	maxAuditLines = 4096
	// maxChallenges bounds the messages of an issuer before its result.
	maxChallenges = 4
	// entryPage is how many entries one message of SyncAuthorizedEntries holds.
	entryPage = 500
)

const (
	// endpointLease is how long an endpoint outlives the stream of the sidecar
	// that announced it: longer than an issuer's restart and the slowest
	// reconnect. It is announced again at a third of it.
	endpointLease = 60 * time.Second
	// helloTimeout bounds the wait for the first message of a stream.
	helloTimeout = 10 * time.Second
	// alivePeriod is how often a subscriber repeats its last answer: whether it
	// lives is known by the stream, which the keepalive below ends when it does
	// not. identityPeriod is how often it looks whether its SVID was renewed.
	alivePeriod    = 2 * time.Minute
	identityPeriod = 10 * time.Second
	// keepaliveAfter and keepaliveTimeout find a dead peer within 30 s.
	keepaliveAfter   = 20 * time.Second
	keepaliveTimeout = 10 * time.Second
	// idleTimeout ends a connection without a stream, such as one of a stranger
	// who only wants to hold it.
	idleTimeout = 5 * time.Minute
	// drainTimeout bounds the end of calls in flight when a Server stops.
	drainTimeout = 5 * time.Second
)

// ServerID is the SPIFFE ID that every issuer of td proves.
func ServerID(td spiffeid.TrustDomain) spiffeid.ID {
	return spiffeid.RequireFromPath(td, serverPath)
}

// AgentID is the SPIFFE ID of the agent that joins td by a token under name,
// one path segment.
func AgentID(td spiffeid.TrustDomain, name string) (spiffeid.ID, error) {
	return spiffeid.FromSegments(td, "spire", "agent", "join_token", name)
}
