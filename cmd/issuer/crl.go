package main

import (
	"context"
	"fmt"
	"math/big"
	"path/filepath"
	"time"

	"sallyport/internal/ca"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

const (
	// crlLife is how long a list is good; it is signed anew at a third of it.
	crlLife = 15 * time.Minute
	// crlPoll is how soon a list that is due is signed.
	crlPoll = 15 * time.Second
)

// A crl is the list of revoked certificates at data_dir/crl.der: what proxies
// are told over their streams, for everybody else.
type crl struct {
	revision uint64
	entries  int
	made     time.Time
}

// due reports whether the list must be signed: what it holds has changed, by a
// revocation or because one has ended, or it is old.
func (l *crl) due(revision uint64, entries int, now time.Time) bool {
	return l.made.IsZero() || revision != l.revision || entries != l.entries || now.Sub(l.made) >= crlLife/3 || now.Before(l.made)
}

// crlEntries puts revocations into the form of the list.
func crlEntries(list []mesh.RevokedSVID) ([]ca.Revoked, error) {
	out := make([]ca.Revoked, 0, len(list))
	for _, r := range list {
		n, ok := new(big.Int).SetString(r.Serial, 16)
		if !ok {
			return nil, fmt.Errorf("serial number %.64q of a revocation is not hex", r.Serial)
		}
		out = append(out, ca.Revoked{Serial: n, At: r.At})
	}
	return out, nil
}

// publishCRL keeps crl.der until ctx ends.
func (in *issuer) publishCRL(ctx context.Context) error {
	tick := time.NewTicker(crlPoll)
	defer tick.Stop()
	var l crl
	for {
		changed, revoked := in.ca.Changed(), in.registry.Changed()
		if err := in.writeCRL(&l); err != nil && ctx.Err() == nil {
			in.log.Error("list of revoked certificates not written", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-revoked:
		case <-changed:
			l.made = time.Time{} // the intermediate may be another
		}
	}
}

func (in *issuer) writeCRL(l *crl) error {
	now, known := time.Now(), in.registry.Revocations()
	list := known.After(0, now)
	if !l.due(known.Revision, len(list), now) {
		return nil
	}
	entries, err := crlEntries(list)
	if err != nil {
		return err
	}
	der, err := in.ca.CRL(entries, crlLife)
	if err != nil {
		return err
	}
	if err := daemon.WriteFile(filepath.Join(in.cfg.DataDir, "crl.der"), der, 0o644); err != nil {
		return err
	}
	*l = crl{revision: known.Revision, entries: len(list), made: now}
	return nil
}
