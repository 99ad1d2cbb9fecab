package main

import (
	"context"
	"fmt"
	"maps"
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
	// crlPoll is how soon a ban is in the list.
	crlPoll = 15 * time.Second
)

// A crl is the list of revoked certificates at data_dir/crl.der.
type crl struct {
	since map[string]time.Time // by serial number, decimal
	made  time.Time
}

// revokedOf are the serial numbers of banned agents whose SVIDs have not
// expired.
func revokedOf(agents []mesh.Agent, now time.Time) []string {
	var out []string
	for _, a := range agents {
		if !a.Banned || !now.Before(a.ExpiresAt) {
			continue
		}
		for _, serial := range []string{a.Serial, a.NextSerial} {
			if serial != "" {
				out = append(out, serial)
			}
		}
	}
	return out
}

// take puts the serial numbers in the list and reports whether it must be
// signed: when it changed, or is due.
func (l *crl) take(serials []string, now time.Time) bool {
	next := make(map[string]time.Time, len(serials))
	for _, s := range serials {
		next[s] = now
		if at, ok := l.since[s]; ok {
			next[s] = at
		}
	}
	same := maps.Equal(next, l.since)
	l.since = next
	return !same || now.Sub(l.made) >= crlLife/3 || now.Before(l.made)
}

func (l *crl) revoked() ([]ca.Revoked, error) {
	out := make([]ca.Revoked, 0, len(l.since))
	for s, at := range l.since {
		n, ok := new(big.Int).SetString(s, 10)
		if !ok {
			return nil, fmt.Errorf("serial number %.64q of an agent is not decimal", s)
		}
		out = append(out, ca.Revoked{Serial: n, At: at})
	}
	return out, nil
}

// publishCRL keeps crl.der until ctx ends.
func (in *issuer) publishCRL(ctx context.Context) error {
	tick := time.NewTicker(crlPoll)
	defer tick.Stop()
	var l crl
	for {
		changed := in.ca.Changed()
		if err := in.writeCRL(ctx, &l); err != nil && ctx.Err() == nil {
			in.log.Error("list of revoked certificates not written", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-changed:
			l.made = time.Time{} // the intermediate may be another
		}
	}
}

func (in *issuer) writeCRL(ctx context.Context, l *crl) error {
	agents, err := in.registry.ListAgents(ctx)
	if err != nil {
		return err
	}
	now := time.Now()
	if !l.take(revokedOf(agents, now), now) {
		return nil
	}
	revoked, err := l.revoked()
	if err != nil {
		return err
	}
	der, err := in.ca.CRL(revoked, crlLife)
	if err != nil {
		return err
	}
	if err := daemon.WriteFile(filepath.Join(in.cfg.DataDir, "crl.der"), der, 0o644); err != nil {
		return err
	}
	l.made = now
	return nil
}
