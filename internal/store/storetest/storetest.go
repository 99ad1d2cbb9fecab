// Package storetest is the suite that every store.Store must pass.
//
// It uses only what the interface promises. What a backend promises beyond
// it, such as surviving a kill, is tested beside that backend.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sallyport/internal/store"
)

// An Opener returns an empty store that reads time from now, and closes it
// when the test ends.
type Opener func(t *testing.T, now func() time.Time) store.Store

// start is when the suite's clock starts: a moment with microseconds.
var start = time.Date(2030, 5, 1, 12, 0, 0, 123456000, time.UTC)

// Run runs the whole suite, each case on a store of its own.
func Run(t *testing.T, open Opener) {
	for _, c := range []struct {
		name string
		run  func(*testing.T, *fixture)
	}{
		{"an empty store has nothing", empty},
		{"a record is put, read, replaced and deleted", crud},
		{"kinds do not mix", kinds},
		{"a caller owns the bytes it gave and got", ownership},
		{"a write goes through only at the expected revision", conditions},
		{"a write with many ops is all or nothing", atomicity},
		{"ops apply in their order", order},
		{"a call that makes no sense is refused", invalid},
		{"changes are in the order of revisions", changes},
		{"deleting what is absent changes nothing", absent},
		{"an expired record is gone", expiry},
		{"values of any size and byte come back", values},
		{"pages follow the byte order of keys", pages},
		{"20 writers lose no increment", increments},
		{"a reader never sees half a write", isolation},
		{"a cancelled call says so and writes nothing", cancelled},
		{"a watcher is woken by a write", watching},
		{"who follows the changes misses none", following},
		{"a lease has one holder, and its fence only grows", leases},
		{"a closed store refuses everything", closed},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := &fixture{now: start}
			f.Store = open(t, f.clock)
			c.run(t, f)
		})
	}
}

// A fixture is a store and the clock it reads.
type fixture struct {
	store.Store
	mu  sync.Mutex // guards now
	now time.Time
}

func (f *fixture) clock() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now
}

func (f *fixture) advance(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now = f.now.Add(d)
}

// write writes and fails the test if that fails.
func (f *fixture) write(t *testing.T, ops ...store.Op) int64 {
	t.Helper()
	rev, err := f.Write(t.Context(), ops...)
	if err != nil {
		t.Fatalf("Write: %v", err)
	}
	return rev
}

// want checks one record by value.
func (f *fixture) want(t *testing.T, kind store.Kind, key, value string) store.Record {
	t.Helper()
	r, err := f.Get(t.Context(), kind, key)
	if err != nil {
		t.Fatalf("Get: %v", err)
	}
	if r.Kind != kind || r.Key != key || string(r.Value) != value {
		t.Errorf("Get(%s, %s) = %s %s %q, want value %q", kind, key, r.Kind, r.Key, r.Value, value)
	}
	return r
}

// gone checks that a record does not exist.
func (f *fixture) gone(t *testing.T, kind store.Kind, key string) {
	t.Helper()
	if r, err := f.Get(t.Context(), kind, key); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("Get(%s, %s) = %q, %v, want ErrNotFound", kind, key, r.Value, err)
	}
}

// keys lists the keys of a kind.
func (f *fixture) keys(t *testing.T, kind store.Kind, after string, limit int) []string {
	t.Helper()
	list, err := f.List(t.Context(), kind, after, limit)
	if err != nil {
		t.Fatalf("List: %v", err)
	}
	var keys []string
	for _, r := range list {
		keys = append(keys, r.Key)
	}
	return keys
}

func put(key, value string) store.Op {
	return store.Op{Kind: store.KindEntry, Key: key, Value: []byte(value)}
}

func empty(t *testing.T, f *fixture) {
	f.gone(t, store.KindEntry, "a")
	if keys := f.keys(t, store.KindEntry, "", 0); len(keys) != 0 {
		t.Errorf("List = %v, want nothing", keys)
	}
	if got, err := f.Changes(t.Context(), 0, 0); err != nil || len(got) != 0 {
		t.Errorf("Changes = %v, %v, want nothing", got, err)
	}
	if rev, err := f.Revision(t.Context()); rev != 0 || err != nil {
		t.Errorf("Revision = %d, %v, want 0", rev, err)
	}
	if rev := f.write(t); rev != 0 {
		t.Errorf("Write of nothing = %d, want 0", rev)
	}
}

func crud(t *testing.T, f *fixture) {
	one := f.write(t, put("a", "1"))
	if r := f.want(t, store.KindEntry, "a", "1"); r.Revision != one || one != 1 || !r.Expires.IsZero() {
		t.Errorf("first record = %+v, want revision %d = 1 and no expiry", r, one)
	}
	two := f.write(t, put("a", "2"))
	if r := f.want(t, store.KindEntry, "a", "2"); r.Revision != two || two != one+1 {
		t.Errorf("second record = %+v, want revision %d = %d", r, two, one+1)
	}
	three := f.write(t, store.Op{Kind: store.KindEntry, Key: "a", Delete: true})
	f.gone(t, store.KindEntry, "a")
	if rev, err := f.Revision(t.Context()); rev != three || err != nil {
		t.Errorf("Revision = %d, %v, want %d", rev, err, three)
	}
	if four := f.write(t, put("a", "4")); four != three+1 {
		t.Errorf("revision after a delete = %d, want %d", four, three+1)
	}
}

func kinds(t *testing.T, f *fixture) {
	f.write(t,
		store.Op{Kind: store.KindToken, Key: "k", Value: []byte("token")},
		store.Op{Kind: store.KindAgent, Key: "k", Value: []byte("agent")})
	f.want(t, store.KindToken, "k", "token")
	f.write(t, store.Op{Kind: store.KindToken, Key: "k", Delete: true})
	f.gone(t, store.KindToken, "k")
	f.want(t, store.KindAgent, "k", "agent")
	if got, want := f.keys(t, store.KindAgent, "", 0), []string{"k"}; !cmp.Equal(got, want) {
		t.Errorf("List = %v, want %v", got, want)
	}
}

func ownership(t *testing.T, f *fixture) {
	value := []byte("mine")
	f.write(t, store.Op{Kind: store.KindEntry, Key: "a", Value: value})
	clear(value)
	clear(f.want(t, store.KindEntry, "a", "mine").Value)
	f.want(t, store.KindEntry, "a", "mine")
}

func conditions(t *testing.T, f *fixture) {
	at := func(rev int64, op store.Op) store.Op {
		op.IfRevision = &rev
		return op
	}
	remove := store.Op{Kind: store.KindEntry, Key: "a", Delete: true}
	conflict := func(op store.Op) {
		t.Helper()
		if _, err := f.Write(t.Context(), op); !errors.Is(err, store.ErrConflict) {
			t.Errorf("Write(%+v, if %d) = %v, want ErrConflict", op, *op.IfRevision, err)
		}
	}
	conflict(at(1, put("a", "x")))
	conflict(at(1, remove))
	one := f.write(t, at(0, put("a", "1")))
	conflict(at(0, put("a", "x")))
	conflict(at(one+1, put("a", "x")))
	two := f.write(t, at(one, put("a", "2")))
	conflict(at(one, put("a", "x")))
	conflict(at(one, remove))
	f.want(t, store.KindEntry, "a", "2")
	f.write(t, at(two, remove))
	f.gone(t, store.KindEntry, "a")
	f.write(t, at(0, remove))
	if last := f.write(t, at(0, put("a", "again"))); last != two+2 {
		t.Errorf("revision = %d, want %d: refused writes take none", last, two+2)
	}
}

func atomicity(t *testing.T, f *fixture) {
	f.write(t, put("a", "1"))
	never := int64(99)
	_, err := f.Write(t.Context(), put("a", "2"), put("b", "2"),
		store.Op{Kind: store.KindEntry, Key: "c", Value: []byte("2"), IfRevision: &never})
	if !errors.Is(err, store.ErrConflict) {
		t.Fatalf("Write = %v, want ErrConflict", err)
	}
	f.want(t, store.KindEntry, "a", "1")
	f.gone(t, store.KindEntry, "b")
	if rev := f.write(t, put("a", "2"), put("b", "2"), put("c", "2")); rev != 4 {
		t.Errorf("revision = %d, want 4: one for each op", rev)
	}
	for i, key := range []string{"a", "b", "c"} {
		if r := f.want(t, store.KindEntry, key, "2"); r.Revision != int64(i)+2 {
			t.Errorf("revision of %s = %d, want %d", key, r.Revision, i+2)
		}
	}
}

func order(t *testing.T, f *fixture) {
	mine := int64(1)
	f.write(t, put("a", "1"), put("a", "2"),
		store.Op{Kind: store.KindEntry, Key: "a", Delete: true}, put("a", "4"))
	if r := f.want(t, store.KindEntry, "a", "4"); r.Revision != 4 {
		t.Errorf("revision = %d, want 4", r.Revision)
	}
	// A condition sees what earlier ops of the same write did.
	_, err := f.Write(t.Context(), put("b", "1"), store.Op{Kind: store.KindEntry, Key: "b", Value: []byte("2"), IfRevision: &mine})
	if !errors.Is(err, store.ErrConflict) {
		t.Errorf("Write = %v, want ErrConflict", err)
	}
	mine = 5
	f.write(t, put("b", "1"), store.Op{Kind: store.KindEntry, Key: "b", Value: []byte("2"), IfRevision: &mine})
	f.want(t, store.KindEntry, "b", "2")
}

func invalid(t *testing.T, f *fixture) {
	for name, op := range map[string]store.Op{
		"no kind":          {Key: "a"},
		"no key":           {Kind: store.KindEntry},
		"long key":         put(strings.Repeat("k", store.MaxKey+1), ""),
		"NUL in key":       put("a\x00b", ""),
		"not UTF-8":        put("a\xff", ""),
		"value too large":  {Kind: store.KindEntry, Key: "a", Value: make([]byte, store.MaxValue+1)},
		"expiry in 1969":   {Kind: store.KindEntry, Key: "a", Expires: time.Unix(-1, 0)},
		"delete of no key": {Kind: store.KindEntry, Delete: true},
	} {
		if _, err := f.Write(t.Context(), put("good", "1"), op); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("%s: Write = %v, want ErrInvalid", name, err)
		}
	}
	f.gone(t, store.KindEntry, "good")
}

func changes(t *testing.T, f *fixture) {
	f.write(t, put("a", "1"))
	f.advance(time.Second)
	f.write(t, put("b", "1"), store.Op{Kind: store.KindEntry, Key: "a", Delete: true})
	f.advance(-time.Hour)
	f.write(t, store.Op{Kind: store.KindAgent, Key: "c", Value: []byte("1")})
	all := []store.Change{
		{Revision: 1, Kind: store.KindEntry, Key: "a", At: start},
		{Revision: 2, Kind: store.KindEntry, Key: "b", At: start.Add(time.Second)},
		{Revision: 3, Kind: store.KindEntry, Key: "a", Deleted: true, At: start.Add(time.Second)},
		{Revision: 4, Kind: store.KindAgent, Key: "c", At: start.Add(time.Second - time.Hour)},
	}
	for _, c := range []struct {
		after int64
		limit int
		want  []store.Change
	}{{0, 0, all}, {-1, 0, all}, {0, 2, all[:2]}, {2, 0, all[2:]}, {2, 1, all[2:3]}, {4, 0, nil}, {99, 0, nil}} {
		got, err := f.Changes(t.Context(), c.after, c.limit)
		if err != nil {
			t.Fatalf("Changes(%d, %d): %v", c.after, c.limit, err)
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("Changes(%d, %d), -want +got:\n%s", c.after, c.limit, diff)
		}
	}
}

func absent(t *testing.T, f *fixture) {
	f.write(t, put("a", "1"))
	rev := f.write(t, store.Op{Kind: store.KindEntry, Key: "b", Delete: true})
	if got, _ := f.Changes(t.Context(), 0, 0); rev != 1 || len(got) != 1 {
		t.Errorf("revision %d after changes %v, want 1 after one change", rev, got)
	}
}

func expiry(t *testing.T, f *fixture) {
	until := start.Add(time.Minute)
	lasting := put("lasting", "1")
	short := put("short", "1")
	short.Expires = until.Add(999 * time.Nanosecond)
	f.write(t, lasting, short)
	if r := f.want(t, store.KindEntry, "short", "1"); !r.Expires.Equal(until) || r.Expires.Location() != time.UTC {
		t.Errorf("Expires = %v, want %v", r.Expires, until)
	}
	f.advance(time.Minute - time.Microsecond)
	f.want(t, store.KindEntry, "short", "1")
	f.advance(time.Microsecond)
	f.gone(t, store.KindEntry, "short")
	if got, want := f.keys(t, store.KindEntry, "", 0), []string{"lasting"}; !cmp.Equal(got, want) {
		t.Errorf("List = %v, want %v", got, want)
	}
	// To a write it is absent as well.
	old, none := int64(2), int64(0)
	again := put("short", "2")
	again.IfRevision = &old
	if _, err := f.Write(t.Context(), again); !errors.Is(err, store.ErrConflict) {
		t.Errorf("Write at the revision of an expired record = %v, want ErrConflict", err)
	}
	if rev := f.write(t, store.Op{Kind: store.KindEntry, Key: "short", Delete: true}); rev != 2 {
		t.Errorf("deleting an expired record took revision %d", rev)
	}
	again.IfRevision = &none
	f.write(t, again)
	if r := f.want(t, store.KindEntry, "short", "2"); !r.Expires.IsZero() {
		t.Errorf("Expires = %v after a put without one", r.Expires)
	}
}

func values(t *testing.T, f *fixture) {
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	for i, value := range [][]byte{nil, {}, {0}, all, bytes.Repeat(all, 1<<12), bytes.Repeat([]byte{7}, store.MaxValue)} {
		key := fmt.Sprint("v", i)
		f.write(t, store.Op{Kind: store.KindBundle, Key: key, Value: value})
		r, err := f.Get(t.Context(), store.KindBundle, key)
		if err != nil {
			t.Fatalf("Get: %v", err)
		}
		if r.Value == nil || !bytes.Equal(r.Value, value) {
			t.Errorf("a value of %d bytes came back as %d (nil: %v)", len(value), len(r.Value), r.Value == nil)
		}
	}
	long := strings.Repeat("ключ", store.MaxKey/8)
	f.write(t, put(long, "1"))
	f.want(t, store.KindEntry, long, "1")
}

func pages(t *testing.T, f *fixture) {
	want := []string{"A", "B", "a", "a b", "a/b", "a0", "b", "ä", "\U0001F511"}
	for _, i := range []int{4, 8, 0, 2, 6, 1, 7, 5, 3} {
		f.write(t, put(want[i], "1"))
	}
	if got := f.keys(t, store.KindEntry, "", 0); !cmp.Equal(got, want) {
		t.Errorf("List = %q, want %q", got, want)
	}
	var got []string
	for after := ""; ; {
		page := f.keys(t, store.KindEntry, after, 2)
		if len(page) == 0 {
			break
		}
		if len(page) > 2 {
			t.Fatalf("a page of 2 has %d", len(page))
		}
		got = append(got, page...)
		after = page[len(page)-1]
	}
	if !cmp.Equal(got, want) {
		t.Errorf("pages = %q, want %q", got, want)
	}
	if got, want := f.keys(t, store.KindEntry, "a1", 0), want[6:]; !cmp.Equal(got, want) {
		t.Errorf("List after an absent key = %q, want %q", got, want)
	}
}

func increments(t *testing.T, f *fixture) {
	const writers, each = 20, 10
	f.write(t, put("n", ""))
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for done := 0; done < each; {
				r, err := f.Get(t.Context(), store.KindEntry, "n")
				if err == nil {
					_, err = f.Write(t.Context(), store.Op{Kind: store.KindEntry, Key: "n", Value: append(r.Value, '+'), IfRevision: &r.Revision})
				}
				switch {
				case err == nil:
					done++
				case !errors.Is(err, store.ErrConflict):
					t.Errorf("increment: %v", err)
					return
				}
			}
		})
	}
	wg.Wait()
	f.want(t, store.KindEntry, "n", strings.Repeat("+", writers*each))
	if got, _ := f.Changes(t.Context(), 0, 0); len(got) != writers*each+1 {
		t.Errorf("%d changes, want %d", len(got), writers*each+1)
	}
}

func isolation(t *testing.T, f *fixture) {
	ctx, cancel := context.WithCancel(t.Context())
	f.write(t, put("a", "0"), put("b", "0"))
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			last := int64(0)
			for ctx.Err() == nil {
				list, err := f.List(t.Context(), store.KindEntry, "", 0)
				if err != nil || len(list) != 2 {
					t.Errorf("List = %d records, %v", len(list), err)
					return
				}
				if !bytes.Equal(list[0].Value, list[1].Value) || list[1].Revision < last {
					t.Errorf("saw %s and %s at revision %d after %d", list[0].Value, list[1].Value, list[1].Revision, last)
					return
				}
				last = list[1].Revision
			}
		})
	}
	for i := range 100 {
		rev := f.write(t, put("a", fmt.Sprint(i)), put("b", fmt.Sprint(i)))
		if r := f.want(t, store.KindEntry, "b", fmt.Sprint(i)); r.Revision != rev {
			t.Errorf("read revision %d after writing %d", r.Revision, rev)
		}
	}
	cancel()
	wg.Wait()
}

func cancelled(t *testing.T, f *fixture) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.Write(ctx, put("a", "1")); !errors.Is(err, context.Canceled) {
		t.Errorf("Write = %v, want context.Canceled", err)
	}
	if _, err := f.Get(ctx, store.KindEntry, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("Get = %v, want context.Canceled", err)
	}
	if _, err := f.List(ctx, store.KindEntry, "", 0); !errors.Is(err, context.Canceled) {
		t.Errorf("List = %v, want context.Canceled", err)
	}
	f.gone(t, store.KindEntry, "a")
	f.write(t, put("a", "1"))
}

func closed(t *testing.T, f *fixture) {
	f.write(t, put("a", "1"))
	for range 2 {
		if err := f.Close(); err != nil {
			t.Fatalf("Close: %v", err)
		}
	}
	_, get := f.Get(t.Context(), store.KindEntry, "a")
	_, list := f.List(t.Context(), store.KindEntry, "", 0)
	_, write := f.Write(t.Context(), put("a", "2"))
	_, revision := f.Revision(t.Context())
	_, since := f.Changes(t.Context(), 0, 0)
	_, watch := f.Watch(t.Context(), 0)
	for name, err := range map[string]error{"Get": get, "List": list, "Write": write, "Revision": revision, "Changes": since, "Watch": watch} {
		if !errors.Is(err, store.ErrClosed) {
			t.Errorf("%s = %v, want ErrClosed", name, err)
		}
	}
}
