package record

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"runtime"
	"sync"
	"weak"
)

// states holds what connections have in common that were made by the same
// certificates in the same way, for as long as one of them is there. A parsed
// chain takes some kilobytes, and peers make many connections with one.
var states struct {
	mu    sync.Mutex // guards known
	known map[stateKey]weak.Pointer[tls.ConnectionState]
}

type stateKey [sha256.Size]byte

// share gives what is kept of the state of a handshake. Nobody changes it.
func share(cs *tls.ConnectionState) *tls.ConnectionState {
	key := keyOf(cs)
	states.mu.Lock()
	defer states.mu.Unlock()
	if s := states.known[key].Value(); s != nil {
		return s
	}
	s := &tls.ConnectionState{
		Version: cs.Version, HandshakeComplete: true, CipherSuite: cs.CipherSuite, CurveID: cs.CurveID,
		NegotiatedProtocol: cs.NegotiatedProtocol,
		PeerCertificates:   append([]*x509.Certificate(nil), cs.PeerCertificates...),
	}
	if states.known == nil {
		states.known = map[stateKey]weak.Pointer[tls.ConnectionState]{}
	}
	w := weak.Make(s)
	states.known[key] = w
	runtime.AddCleanup(s, func(key stateKey) {
		states.mu.Lock()
		defer states.mu.Unlock()
		if states.known[key].Value() == nil { // another may stand there by now
			delete(states.known, key)
		}
	}, key)
	return s
}

// keyOf tells states apart by all that is kept of them, certificates by every
// byte.
func keyOf(cs *tls.ConnectionState) (key stateKey) {
	h := sha256.New()
	var head [8]byte
	binary.BigEndian.PutUint16(head[0:], cs.Version)
	binary.BigEndian.PutUint16(head[2:], cs.CipherSuite)
	binary.BigEndian.PutUint16(head[4:], uint16(cs.CurveID))
	h.Write(head[:])
	add := func(b []byte) {
		binary.BigEndian.PutUint64(head[:], uint64(len(b)))
		h.Write(head[:])
		h.Write(b)
	}
	add([]byte(cs.NegotiatedProtocol))
	for _, c := range cs.PeerCertificates {
		add(c.Raw)
	}
	h.Sum(key[:0])
	return key
}
