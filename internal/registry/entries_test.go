package registry_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/store"
)

func entryOf(name, path, node, selector string) mesh.Entry {
	sel, err := mesh.ParseSelector(selector)
	if err != nil {
		panic(err)
	}
	return mesh.Entry{ID: name, SPIFFEID: id(path), ParentID: agent(node), Selectors: []mesh.Selector{sel}}
}

func create(e mesh.Entry) mesh.EntryEdit {
	return mesh.EntryEdit{Change: func(mesh.Entry) (mesh.Entry, error) { return e, nil }}
}

func (in *issuer) edit(edits ...mesh.EntryEdit) []mesh.EntryResult {
	in.t.Helper()
	out, err := in.EditEntries(context.Background(), edits)
	if err != nil {
		in.t.Fatalf("EditEntries: %v", err)
	}
	return out
}

func TestEntriesMadeByCallsStandBesideTheReviewedOnes(t *testing.T) {
	in := start(t)
	p := policies("pay")
	p.Entries[0].Origin = mesh.Origin{File: "entries.yaml", Line: 3}
	in.apply(p)
	woken := in.Changed()
	cron := entryOf("", "/ns/shop/sa/cron", "node-c", "unix:uid:77")
	weak := entryOf("", "/ns/shop/sa/weak", "node-c", "unix:path:/bin/x")
	again := entryOf("other", "/ns/shop/sa/cron", "node-c", "unix:uid:77")
	taken := entryOf("pay-1", "/ns/shop/sa/x", "node-c", "unix:uid:78")
	got := in.edit(create(cron), create(weak), create(again), create(taken),
		mesh.EntryEdit{ID: "pay-1", Delete: true}, mesh.EntryEdit{ID: "nobody", Delete: true})
	select {
	case <-woken:
	default:
		t.Error("nobody was woken by a new entry")
	}
	made := got[0].Entry
	if got[0].Err != nil || made.ID == "" || made.Revision == 0 || made.CreatedAt.IsZero() {
		t.Fatalf("made %+v, %v", made, got[0].Err)
	}
	var wrong mesh.Errors
	if !errors.As(got[1].Err, &wrong) {
		t.Errorf("weak selector: %v, want what is wrong", got[1].Err)
	}
	if !errors.Is(got[2].Err, mesh.ErrExists) || got[2].Entry.ID != made.ID {
		t.Errorf("same workload: %+v, %v", got[2].Entry, got[2].Err)
	}
	if !errors.Is(got[3].Err, mesh.ErrExists) || got[3].Entry.ID != "pay-1" {
		t.Errorf("same ID: %+v, %v", got[3].Entry, got[3].Err)
	}
	if !errors.Is(got[4].Err, mesh.ErrReviewed) || !errors.Is(got[5].Err, mesh.ErrNotFound) {
		t.Errorf("reviewed %v, absent %v", got[4].Err, got[5].Err)
	}

	in.restart()
	es := in.EntriesFor(agent("node-c"))
	if len(es) != 1 || es[0].ID != made.ID || es[0].Revision != made.Revision {
		t.Fatalf("after a restart %+v", es)
	}
	renamed := in.edit(mesh.EntryEdit{ID: made.ID, Change: func(e mesh.Entry) (mesh.Entry, error) {
		e.Hint = "night"
		return e, nil
	}})[0]
	if renamed.Err != nil || renamed.Entry.Hint != "night" || renamed.Entry.Revision <= made.Revision || !renamed.Entry.CreatedAt.Equal(made.CreatedAt) {
		t.Errorf("changed %+v, %v", renamed.Entry, renamed.Err)
	}
	if out := in.edit(mesh.EntryEdit{ID: made.ID, Delete: true}); out[0].Err != nil || len(in.EntriesFor(agent("node-c"))) != 0 {
		t.Errorf("deleted: %v, left %v", out[0].Err, in.EntriesFor(agent("node-c")))
	}
}

func TestAReviewedEntryCoversOneMadeByACall(t *testing.T) {
	in := start(t)
	in.apply(policies())
	in.edit(create(entryOf("mine", "/ns/shop/sa/pay", "pay-1", "unix:uid:1001")))
	in.apply(policies("pay"))
	es := in.EntriesFor(agent("pay-1"))
	if len(es) != 1 || es[0].ID != "pay-1" {
		t.Errorf("entries %+v, want the reviewed one alone", es)
	}
}

func TestAnEntryEndsInTime(t *testing.T) {
	in := start(t)
	in.apply(policies())
	e := entryOf("short", "/ns/shop/sa/job", "node-j", "unix:uid:5")
	e.ExpiresAt = time.Now().Add(-time.Second)
	if out := in.edit(create(e)); out[0].Err != nil {
		t.Fatal(out[0].Err)
	}
	if n := len(in.EntriesFor(agent("node-j"))) + len(in.Entries()); n != 0 {
		t.Errorf("%d entries past their end are given out", n)
	}
}

func TestADeletedAgentIsForgotten(t *testing.T) {
	in := start(t)
	in.apply(policies("pay"))
	if err := in.PutAgent(context.Background(), mesh.Agent{ID: agent("pay-1"), Serial: "1"}); err != nil {
		t.Fatal(err)
	}
	in.announce(endpoint("pay", 1, "127.0.0.1:9"))
	if err := in.DeleteAgent(context.Background(), agent("pay-1")); err != nil {
		t.Fatal(err)
	}
	if _, err := in.GetAgent(context.Background(), agent("pay-1")); !errors.Is(err, mesh.ErrNotFound) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
	if es := in.Current().Endpoints; len(es) != 0 {
		t.Errorf("endpoints %v are left", es)
	}
	if _, err := in.store.List(context.Background(), store.KindEndpoint, "", 0); err != nil {
		t.Error(err)
	}
}
