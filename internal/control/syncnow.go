package control

import (
	"crypto/sha256"
	"io"
	"slices"
	"time"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// syncForced lets the next look say SyncNow if that was asked for since the
// last one, whatever woke this one, and returns what is closed when it is asked
// for again.
func (sub *subscription) syncForced() <-chan struct{} {
	again, n := sub.s.syncRequested()
	if n != sub.forced {
		sub.told, sub.forced = false, n
	}
	return again
}

// syncNow tells the proxy to fetch identities when its entries or the bundle
// are not those it was told of.
func (sub *subscription) syncNow(entries []mesh.Entry) error {
	trust := sub.s.trust(sub.forced)
	if sub.told && trust == sub.trust && slices.EqualFunc(entries, sub.entries, mesh.Entry.Says) {
		return nil
	}
	sub.told, sub.trust, sub.entries = true, trust, entries
	return sub.st.Send(&meshpb.SubscribeResponse{Message: &meshpb.SubscribeResponse_SyncNow{SyncNow: &meshpb.SyncNow{}}})
}

// trusted is what trust found, and when that was.
type trusted struct {
	sum     [sha256.Size]byte
	at      time.Time
	changed <-chan struct{}
	syncs   uint64
}

// trust is the hash of what proxies are given beside what their entries say. It
// is made once for all who look after one change, or the SyncNow of that number.
func (s *Server) trust(syncs uint64) [sha256.Size]byte {
	changed, now := s.cfg.Registry.Changed(), s.cfg.Now()
	if t := s.trusted.Load(); t != nil && t.changed == changed && t.syncs == syncs && now.Sub(t.at).Abs() < time.Second {
		return t.sum
	}
	h := sha256.New()
	for _, c := range s.cfg.Authority.X509Bundle() {
		h.Write(c.Raw)
	}
	for _, c := range s.tainted() {
		h.Write(c.Raw)
	}
	for _, k := range s.cfg.Authority.JWTKeys() {
		io.WriteString(h, k.KeyID)
	}
	t := &trusted{sum: [sha256.Size]byte(h.Sum(nil)), at: now, changed: changed, syncs: syncs}
	s.trusted.Store(t)
	return t.sum
}
