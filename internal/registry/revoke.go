package registry

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

const (
	// pageMost bounds the SVIDs of one record of the ledger, each of which may
	// name two IDs of 2 KiB: below store.MaxValue.
	pageMost = 2000
	// revokeMost bounds the revocations of one write.
	revokeMost = 1000
)

// ledger is what was issued, in the store. What is asked for at once shares
// one write.
type ledger struct {
	mu      sync.Mutex // guards next
	next    *page
	writing sync.Mutex // held by who writes
}

// A page is one write of the ledger.
type page struct {
	list []mesh.Issued
	done bool // guarded by ledger.writing, as err is
	err  error
}

// RecordIssued keeps what an issuer is about to give out, so that it can be
// revoked. It is durable on return; each ends with its Until.
func (r *Registry) RecordIssued(ctx context.Context, list []mesh.Issued) error {
	if len(list) == 0 {
		return nil
	}
	l := &r.ledger
	l.mu.Lock()
	if l.next == nil {
		l.next = &page{}
	}
	p := l.next
	p.list = append(p.list, list...)
	l.mu.Unlock()
	l.writing.Lock()
	defer l.writing.Unlock()
	if !p.done {
		l.mu.Lock()
		l.next = nil
		l.mu.Unlock()
		p.done = true
		// Others wait for it too: it does not end with the first of them.
		p.err = r.writePage(context.WithoutCancel(ctx), p.list)
	}
	if p.err != nil {
		return fmt.Errorf("record what is issued: %w", p.err)
	}
	return nil
}

func (r *Registry) writePage(ctx context.Context, all []mesh.Issued) error {
	var ops []store.Op
	for list := range slices.Chunk(all, pageMost) {
		value, err := json.Marshal(list)
		if err != nil {
			return err
		}
		last := slices.MaxFunc(list, func(a, b mesh.Issued) int { return a.Until.Compare(b.Until) })
		ops = append(ops, store.Op{Kind: store.KindIssued, Key: rand.Text(), Value: value, Expires: last.Until})
	}
	_, err := r.write(ctx, ops...)
	return err
}

// issued reads what was issued and may still have something open.
func (r *Registry) issued(ctx context.Context) ([]mesh.Issued, error) {
	records, err := r.list(ctx, store.KindIssued)
	if err != nil {
		return nil, fmt.Errorf("read what was issued: %w", err)
	}
	now := r.cfg.Now()
	var all []mesh.Issued
	for _, rec := range records {
		var some []mesh.Issued
		if err := json.Unmarshal(rec.Value, &some); err != nil {
			return nil, fmt.Errorf("read what was issued: record %s: %w", rec.Key, err)
		}
		for _, i := range some {
			if now.Before(i.Until) {
				all = append(all, i)
			}
		}
	}
	return all, nil
}

// Revocations returns what is revoked, never nil.
func (r *Registry) Revocations() *mesh.RevokedSVIDs {
	if v := r.revoked.Load(); v != nil {
		return v
	}
	return &mesh.RevokedSVIDs{}
}

// loadRevocations reads what is revoked. What another issuer writes meanwhile
// has a greater revision than all that this has seen, and its change follows.
// mu is held.
func (r *Registry) loadRevocations(ctx context.Context) error {
	upTo, err := r.cfg.Store.Revision(ctx)
	if err != nil {
		return fmt.Errorf("load revocations: %w", err)
	}
	records, err := r.list(ctx, store.KindRevocation)
	if err != nil {
		return fmt.Errorf("load revocations: %w", err)
	}
	old := r.Revocations()
	next := &mesh.RevokedSVIDs{Revision: old.Revision}
	for _, rec := range records {
		var v mesh.RevokedSVID
		if err := json.Unmarshal(rec.Value, &v); err != nil {
			return fmt.Errorf("load revocation %s: %w", rec.Key, err)
		}
		if rec.Revision > upTo {
			continue // the list may lack others of its time
		}
		v.Revision = uint64(rec.Revision)
		next.Revision = max(next.Revision, v.Revision)
		next.All = append(next.All, v)
	}
	slices.SortFunc(next.All, func(a, b mesh.RevokedSVID) int { return cmp.Compare(a.Revision, b.Revision) })
	r.revoked.Store(next)
	if next.Revision != old.Revision {
		r.wakeAll()
	}
	return nil
}

// revoke makes revocations durable and known. What another issuer has revoked
// meanwhile is left to it, so that each is told of once. mu is held.
func (r *Registry) revoke(ctx context.Context, list []mesh.RevokedSVID) error {
	if len(list) == 0 {
		return nil
	}
	seen := make(map[string]bool, len(list)) // of one serial number only the first is written
	list = slices.DeleteFunc(slices.Clone(list), func(v mesh.RevokedSVID) bool {
		twice := seen[v.Serial]
		seen[v.Serial] = true
		return twice
	})
	for some := range slices.Chunk(list, revokeMost) {
		err := r.writeRevocations(ctx, some)
		for errors.Is(err, store.ErrConflict) {
			if err := r.loadRevocations(ctx); err != nil {
				return err
			}
			over := r.Revocations()
			some = slices.DeleteFunc(some, func(v mesh.RevokedSVID) bool { return over.Has(v.Serial) })
			err = r.writeRevocations(ctx, some)
		}
		if err != nil {
			return fmt.Errorf("revoke: %w", err)
		}
		// Said now: what fails later is tried again without these.
		for _, v := range some {
			r.cfg.Log.Warn("SVID revoked", "id", v.ID.String(), "serial", v.Serial, "why", v.Why, "until", v.Until)
		}
		if r.cfg.OnRevoke != nil && len(some) > 0 {
			r.cfg.OnRevoke(some)
		}
	}
	return r.loadRevocations(ctx)
}

func (r *Registry) writeRevocations(ctx context.Context, some []mesh.RevokedSVID) error {
	if len(some) == 0 {
		return nil
	}
	var ops []store.Op
	none := int64(0)
	for _, v := range some {
		value, err := json.Marshal(v)
		if err != nil {
			return err
		}
		ops = append(ops, store.Op{Kind: store.KindRevocation, Key: v.Serial, Value: value, Expires: v.Until, IfRevision: &none})
	}
	_, err := r.write(ctx, ops...)
	return err
}

// live are those of list that are not revoked yet.
func (r *Registry) live(list []mesh.Issued) []mesh.Issued {
	over := make(map[string]bool)
	for _, v := range r.Revocations().All {
		over[v.Serial] = true
	}
	return slices.DeleteFunc(list, func(i mesh.Issued) bool { return over[i.Serial] })
}

func (r *Registry) revocationOf(i mesh.Issued, why string) mesh.RevokedSVID {
	return mesh.RevokedSVID{ID: i.ID, Serial: i.Serial, At: r.cfg.Now().UTC(), Until: i.Until, Why: why}
}

// ledgerNow reads what was issued, and what of it is revoked. mu is held.
func (r *Registry) ledgerNow(ctx context.Context) ([]mesh.Issued, error) {
	all, err := r.issued(ctx)
	if err != nil {
		return nil, err
	}
	return all, r.loadRevocations(ctx)
}

// Revoke ends what an order names; mesh.ErrNotFound when nothing of that kind
// was issued and may still have something open. What is revoked already is not an error. It is
// durable on return.
func (r *Registry) Revoke(ctx context.Context, o mesh.RevokeOrder) (mesh.RevokeResult, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	all, err := r.ledgerNow(ctx)
	if err != nil {
		return mesh.RevokeResult{}, err
	}
	named := slices.DeleteFunc(all, func(i mesh.Issued) bool {
		ofAgent := i.Entry == "" && !i.Agent.IsZero() // which is banned instead
		return ofAgent || (o.Serial == "" || i.Serial != o.Serial) && (o.Entry == "" || i.Entry != o.Entry) && (o.ID.IsZero() || i.ID != o.ID)
	})
	if len(named) == 0 {
		return mesh.RevokeResult{}, fmt.Errorf("revoke: nothing that still holds was issued so: %w", mesh.ErrNotFound)
	}
	res := mesh.RevokeResult{SVIDs: []mesh.RevokedSVID{}}
	for _, i := range r.live(named) {
		res.SVIDs = append(res.SVIDs, r.revocationOf(i, mesh.WhyRevoked))
	}
	if err := r.revoke(ctx, res.SVIDs); err != nil {
		return mesh.RevokeResult{}, err
	}
	res.Revision = r.Revocations().Revision
	return res, nil
}

// lose notes whether a new state has less than the old, so that what was
// issued for that is revoked. mu is held.
func (r *Registry) lose(old, next *state) {
	if next.lineage == old.lineage {
		return
	}
	if !next.lineage.Keeps(old.lineage) {
		r.lost = true
		return
	}
	below := downstreams(next.entries)
	for id := range downstreams(old.entries) {
		r.lost = r.lost || !below[id]
	}
}

// downstreams are the identities of issuers below this one.
func downstreams(entries []mesh.Entry) map[string]bool {
	out := make(map[string]bool)
	for _, e := range entries {
		if e.Downstream {
			out[e.SPIFFEID.String()] = true
		}
	}
	return out
}

// settleLost revokes what was issued for what is lost. What fails is tried
// again by Run until it is done. mu is held.
func (r *Registry) settleLost(ctx context.Context) error {
	for r.lost {
		r.lost = false // what another issuer is found to have taken away meanwhile needs the ledger anew
		if err := errors.Join(r.revokeGone(ctx), r.dropKeys(ctx)); err != nil {
			r.lost = true
			r.rouse()
			return fmt.Errorf("done, but what was issued before is not revoked yet: %w", err)
		}
	}
	return nil
}

// revokeGone revokes what was issued to agents that are banned or forgotten,
// and for identities that their agents have no entry for any more. mu is held.
func (r *Registry) revokeGone(ctx context.Context) error {
	all, err := r.ledgerNow(ctx)
	if err != nil {
		return err
	}
	if r.shared() {
		// Read after the ledger: what another issuer gave out by an entry that
		// this one has not seen yet is not revoked for that.
		if err := errors.Join(r.adopt(ctx), r.followEntries(ctx)); err != nil {
			return err
		}
	}
	standing, err := r.standing(ctx)
	if err != nil {
		return err
	}
	now := r.state.Load()
	may := make(map[spiffeid.ID]map[spiffeid.ID]bool) // by agent
	var list []mesh.RevokedSVID
	for _, i := range r.live(all) {
		if i.Agent.IsZero() {
			continue // minted
		}
		why, known := standing[i.Agent]
		switch {
		case !known:
			why = mesh.WhyEvicted
		case why == "" && i.Entry != "" && now.accepted != nil:
			if may[i.Agent] == nil {
				may[i.Agent] = make(map[spiffeid.ID]bool)
				for _, e := range now.lineage.Of(i.Agent, r.factsOf(i.Agent), r.cfg.Now()) {
					may[i.Agent][e.SPIFFEID] = true
				}
			}
			if !may[i.Agent][i.ID] {
				why = mesh.WhyWithdrawn
			}
		}
		if why != "" {
			list = append(list, r.revocationOf(i, why))
		}
	}
	return r.revoke(ctx, list)
}
