package svid

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A proof says whose a verified chain is, and between which times all of its
// certificates are valid, the authority in the bundle among them.
type proof struct {
	id          spiffeid.ID
	from, until time.Time
}

// covers is never more generous than crypto/x509, to which the last instant
// still belongs.
func (p proof) covers(now time.Time) bool { return !now.Before(p.from) && now.Before(p.until) }

// proven remembers chains that were verified by the bundles of one State, which
// never change: a State with other bundles begins anew. To verify a signature
// takes as long as a fifth of a handshake, and peers come again with the same
// SVID for as long as it lives.
//
// It says only that the chain is good. That the peer has the key is seen in each
// handshake; times and revocation are looked at by whoever asks. What failed is
// not remembered.
type proven struct {
	mu    sync.Mutex // guards known
	known map[[sha256.Size]byte]proof
}

// maxProven bounds the chains, about 200 bytes each. A peer can make more of
// one SVID by adding authorities that nobody asked for: that costs others what
// they saved, and nothing more.
const maxProven = 1024

// chainKey tells chains apart by every byte of their certificates.
func chainKey(certs []*x509.Certificate) (key [sha256.Size]byte) {
	h := sha256.New()
	var size [8]byte
	for _, c := range certs {
		binary.BigEndian.PutUint64(size[:], uint64(len(c.Raw)))
		h.Write(size[:])
		h.Write(c.Raw)
	}
	h.Sum(key[:0])
	return key
}

func (p *proven) find(key [sha256.Size]byte, now time.Time) (proof, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	got, ok := p.known[key]
	return got, ok && got.covers(now)
}

func (p *proven) add(key [sha256.Size]byte, got proof) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, again := p.known[key]; !again && len(p.known) >= maxProven {
		for other := range p.known { // any one
			delete(p.known, other)
			break
		}
	}
	if p.known == nil {
		p.known = map[[sha256.Size]byte]proof{}
	}
	p.known[key] = got
}
