package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/attest"
	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

// kept are the entries made by calls, by ID, beside those of the reviewed
// files. A map is not changed once it is in here.
type kept = map[string]mesh.Entry

// maxKept bounds the entries made by calls.
const maxKept = 100_000

// union puts entries made by calls behind those of the files. Where both speak
// of the same, the reviewed file holds. What has ended by then is left out.
func (r *Registry) union(files []mesh.Entry, at time.Time) []mesh.Entry {
	calls := r.kept()
	if len(calls) == 0 {
		return slices.Clone(files)
	}
	ids, same := map[string]bool{}, map[string]bool{}
	for _, e := range files {
		ids[e.ID], same[mesh.NewEntryID(e)] = true, true
	}
	out := slices.Clone(files)
	for _, id := range slices.Sorted(maps.Keys(calls)) {
		if e := calls[id]; !ids[id] && !same[mesh.NewEntryID(e)] && !e.Lapsed(at) {
			out = append(out, e)
		}
	}
	return out
}

func (r *Registry) kept() kept {
	if k := r.calls.Load(); k != nil {
		return *k
	}
	return nil
}

// loadEntries reads the entries made by calls, and reports whether they are
// others than before.
func (r *Registry) loadEntries(ctx context.Context) (bool, error) {
	records, err := r.list(ctx, store.KindEntry)
	if err != nil {
		return false, fmt.Errorf("load entries: %w", err)
	}
	old, next := r.kept(), make(kept, len(records))
	changed := len(old) != len(records)
	for _, rec := range records {
		var e mesh.Entry
		if err := json.Unmarshal(rec.Value, &e); err != nil {
			return false, fmt.Errorf("load entry %q: %w", rec.Key, err)
		}
		e.Revision = rec.Revision
		next[e.ID] = e
		changed = changed || old[e.ID].Revision != e.Revision
	}
	r.calls.Store(&next)
	return changed, nil
}

// followEntries takes over what another issuer wrote. mu is held.
func (r *Registry) followEntries(ctx context.Context) error {
	changed, err := r.loadEntries(ctx)
	if err != nil || !changed {
		return err
	}
	rev, err := r.cfg.Store.Revision(ctx)
	if err != nil {
		return fmt.Errorf("follow entries: %w", err)
	}
	r.republish(rev)
	return nil
}

// republish puts the entries as they are now in force. mu is held.
func (r *Registry) republish(rev int64) {
	now := r.state.Load()
	if now.accepted == nil {
		return
	}
	next, snapshot := r.register(now.accepted), *now.snapshot
	snapshot.Endpoints = r.eligible(next, now.accepted.Policies.Services)
	next.snapshot, next.rollout = &snapshot, r.moved(next, now.rollout)
	r.lose(now, next)
	r.publish(next, rev)
}

// lapse takes entries out of force that have ended, as if they were deleted: what
// was issued for them is revoked. In a shared store each issuer does so; what is
// revoked is revoked once. mu is held.
func (r *Registry) lapse(ctx context.Context) error {
	st, now := r.state.Load(), r.cfg.Now()
	if !st.lapsed(now) {
		return nil
	}
	rev, err := r.cfg.Store.Revision(ctx)
	if err != nil {
		return fmt.Errorf("end entries: %w", err)
	}
	r.republish(rev)
	for _, e := range st.entries {
		if e.Lapsed(now) {
			r.cfg.Log.Info("entry ended", "entry", e.ID, "id", e.SPIFFEID.String(), "parent", e.ParentID.String(), "expires_at", e.ExpiresAt)
		}
	}
	return nil
}

// EditEntries changes entries that are kept beside the reviewed files. What is
// possible of the edits is done, in one write, and in force on return; each
// result says what became of its edit: mesh.ErrNotFound, mesh.ErrExists,
// mesh.ErrReviewed, what Change returned, or mesh.Errors of what is wrong with
// the entry. The error is one that befell them all.
func (r *Registry) EditEntries(ctx context.Context, edits []mesh.EntryEdit) ([]mesh.EntryResult, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		results, err := r.editEntries(ctx, edits)
		if !errors.Is(err, store.ErrConflict) {
			return results, err
		}
		// Another issuer was faster.
		if err := r.followEntries(ctx); err != nil {
			return nil, err
		}
		if err := r.settleLost(ctx); err != nil {
			return nil, err
		}
	}
}

// editEntries is one attempt. mu is held.
func (r *Registry) editEntries(ctx context.Context, edits []mesh.EntryEdit) ([]mesh.EntryResult, error) {
	now := r.state.Load()
	if now.accepted == nil {
		return nil, errors.New("edit entries: no policies are in force yet")
	}
	b := &entryBatch{r: r, next: maps.Clone(r.kept()), touched: map[string]bool{}, workloads: map[string]string{}}
	if b.next == nil {
		b.next = kept{}
	}
	b.files = make(map[string]mesh.Entry)
	for id, e := range b.next {
		b.workloads[mesh.NewEntryID(e)] = id
	}
	for _, e := range now.accepted.Policies.Entries {
		b.files[e.ID] = e
		b.workloads[mesh.NewEntryID(e)] = e.ID
	}
	results := make([]mesh.EntryResult, len(edits))
	for i, ed := range edits {
		results[i].Entry, results[i].Err = b.edit(ed)
	}
	if len(b.touched) == 0 {
		return results, nil
	}
	ops, err := b.ops()
	if err != nil {
		return nil, err
	}
	rev, err := r.write(ctx, ops...)
	if err != nil {
		return nil, fmt.Errorf("edit entries: %w", err)
	}
	for id := range b.touched {
		if e, ok := b.next[id]; ok {
			e.Revision = rev
			b.next[id] = e
		}
	}
	for i := range results {
		if e, ok := b.next[results[i].Entry.ID]; ok && results[i].Err == nil && !edits[i].Delete {
			results[i].Entry = e
		}
	}
	r.calls.Store(&b.next)
	r.republish(rev)
	return results, r.settleLost(ctx)
}

// An entryBatch is what a batch of edits makes of the entries.
type entryBatch struct {
	r     *Registry
	next  kept
	files map[string]mesh.Entry
	// workloads names the entry of each parent, identity and selectors.
	workloads map[string]string
	touched   map[string]bool
}

func (b *entryBatch) edit(ed mesh.EntryEdit) (mesh.Entry, error) {
	if e, ok := b.files[ed.ID]; ok {
		return e, fmt.Errorf("entry %s %w: %s", e.ID, mesh.ErrReviewed, e.Origin)
	}
	old, ok := b.next[ed.ID]
	if ed.ID != "" && !ok {
		return mesh.Entry{}, fmt.Errorf("entry %q: %w", ed.ID, mesh.ErrNotFound)
	}
	if ed.Delete {
		b.put(old, nil)
		return old, nil
	}
	e, err := ed.Change(old)
	if err != nil {
		return mesh.Entry{}, err
	}
	e.Origin, e.CreatedAt, e.Revision = mesh.Origin{}, old.CreatedAt, old.Revision
	if e.CreatedAt.IsZero() {
		e.CreatedAt = b.r.cfg.Now().UTC().Round(0)
	}
	if e.ID == "" {
		e.ID = mesh.NewEntryID(e)
	}
	if err := mesh.CheckEntry(b.r.cfg.TrustDomain, e); err != nil {
		return mesh.Entry{}, err
	}
	if other, taken := b.workloads[mesh.NewEntryID(e)]; taken && other != ed.ID {
		return b.find(other), fmt.Errorf("entry %s of the same parent_id, spiffe_id and selectors %w", other, mesh.ErrExists)
	}
	if found := b.find(e.ID); ed.ID == "" && found.ID != "" {
		return found, fmt.Errorf("entry %s %w", e.ID, mesh.ErrExists)
	}
	if ed.ID == "" && len(b.next) >= maxKept {
		return mesh.Entry{}, fmt.Errorf("%d entries are kept already, which is the most", maxKept)
	}
	b.put(old, &e)
	return e, nil
}

func (b *entryBatch) find(id string) mesh.Entry {
	if e, ok := b.files[id]; ok {
		return e
	}
	return b.next[id]
}

// put replaces old, which may be zero, by e, which may be nil.
func (b *entryBatch) put(old mesh.Entry, e *mesh.Entry) {
	if old.ID != "" {
		delete(b.workloads, mesh.NewEntryID(old))
		delete(b.next, old.ID)
		b.touched[old.ID] = true
	}
	if e != nil {
		b.workloads[mesh.NewEntryID(*e)] = e.ID
		b.next[e.ID] = *e
		b.touched[e.ID] = true
	}
}

// ops are the writes. Each expects the record as this issuer knows it.
func (b *entryBatch) ops() ([]store.Op, error) {
	known := b.r.kept()
	var ops []store.Op
	for _, id := range slices.Sorted(maps.Keys(b.touched)) {
		at := known[id].Revision
		e, ok := b.next[id]
		if !ok && at == 0 {
			continue // made and deleted in one batch
		}
		op := store.Op{Kind: store.KindEntry, Key: id, Delete: !ok, IfRevision: &at}
		if ok {
			var err error
			if op.Value, err = json.Marshal(e); err != nil {
				return nil, fmt.Errorf("edit entries: encode: %w", err)
			}
			op.Expires = e.ExpiresAt
		}
		ops = append(ops, op)
	}
	return ops, nil
}

// DeleteAgent forgets an agent, ends its endpoints and revokes what it holds. It
// may attest again.
func (r *Registry) DeleteAgent(ctx context.Context, id spiffeid.ID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	ops := []store.Op{{Kind: store.KindAgent, Key: id.String(), Delete: true}, {Kind: store.KindToken, Key: seenKey(attest.MachineClaim(id)), Delete: true}}
	r.agents.Delete(id)
	if _, err := r.write(ctx, ops...); err != nil {
		return fmt.Errorf("delete agent: %w", err)
	}
	r.nodes.Delete(id)
	r.lost = true
	var over []mesh.Endpoint
	for e := range r.endpoints {
		if e.Agent == id {
			over = append(over, e)
		}
	}
	return errors.Join(r.settleLost(ctx), r.drop(ctx, over))
}
