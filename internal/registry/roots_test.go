package registry_test

import (
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"sallyport/internal/registry"
	"sallyport/internal/store"
)

func sharedRoots(f *fleet) {
	members := []*member{f.join("a", true), f.join("b", true), f.join("c", true)}
	if plan, err := members[0].RootPlan(f.t.Context()); plan != nil || err != nil {
		f.t.Fatalf("before the first: %q, %v", plan, err)
	}
	const each = 4
	var wg sync.WaitGroup
	for _, m := range members {
		wg.Go(func() {
			for range each {
				err := m.EditRootPlan(f.t.Context(), func(was []byte) (plan, root []byte, err error) {
					n := 0
					if was != nil {
						n, err = strconv.Atoi(string(was))
					}
					return strconv.AppendInt(nil, int64(n+1), 10), []byte("root"), err
				})
				if err != nil {
					f.t.Errorf("EditRootPlan: %v", err)
				}
			}
		})
	}
	wg.Wait()
	plan, err := members[1].RootPlan(f.t.Context())
	if want := fmt.Sprint(each * len(members)); string(plan) != want || err != nil {
		f.t.Errorf("plan %q, %v after %s edits", plan, err, want)
	}
	// An edit that fails, or wants nothing, changes nothing and frees the lease.
	refused := errors.New("refused")
	for _, want := range []error{refused, nil} {
		err := members[2].EditRootPlan(f.t.Context(), func([]byte) (plan, root []byte, err error) { return nil, nil, want })
		if !errors.Is(err, want) {
			f.t.Errorf("got %v, want %v", err, want)
		}
	}
	if now, err := members[0].RootPlan(f.t.Context()); string(now) != string(plan) || err != nil {
		f.t.Errorf("plan %q, %v, want %q", now, err, plan)
	}
	// Who does not know the plan knows which root signs.
	if err := members[0].CheckRoot(f.t.Context(), []byte("another")); !errors.Is(err, registry.ErrOtherRoot) {
		f.t.Errorf("CheckRoot = %v, want ErrOtherRoot", err)
	}
}

func sleepyEditor(f *fleet) {
	a, b := f.join("a", false), f.join("b", false)
	edit := func(what string) func([]byte) ([]byte, []byte, error) {
		return func([]byte) ([]byte, []byte, error) { return []byte(what), []byte("root"), nil }
	}
	if err := a.EditRootPlan(f.t.Context(), edit("first")); err != nil {
		f.t.Fatal(err)
	}
	err := a.EditRootPlan(f.t.Context(), func([]byte) ([]byte, []byte, error) {
		f.ahead.Add(int64(10 * time.Second)) // asleep
		if err := b.EditRootPlan(f.t.Context(), edit("second")); err != nil {
			f.t.Errorf("b waits for an issuer that sleeps: %v", err)
		}
		return []byte("late"), []byte("root"), nil
	})
	if !errors.Is(err, store.ErrLost) {
		f.t.Errorf("the write of an issuer that slept: %v, want ErrLost", err)
	}
	if plan, err := a.RootPlan(f.t.Context()); string(plan) != "second" || err != nil {
		f.t.Errorf("plan %q, %v", plan, err)
	}
}

func issuersSpeak(f *fleet) {
	a := f.join("a-1", true)
	dead := f.join("b-1", false)
	if err := dead.TellIssuers(f.t.Context(), "b", []byte("I am b")); err != nil {
		f.t.Fatal(err)
	}
	if err := a.TellIssuers(f.t.Context(), "a", []byte("I am a")); err != nil {
		f.t.Fatal(err)
	}
	heard := func(want map[string]string) func() bool {
		return func() bool {
			got, err := a.IssuersSay(f.t.Context())
			if err != nil || len(got) != len(want) {
				return false
			}
			for name, said := range want {
				if b, is := got[name]; !is || string(b) != said {
					return false
				}
			}
			return true
		}
	}
	f.eventually("both are heard", heard(map[string]string{"a": "I am a", "b": "I am b"}))
	f.join("c-1", false)
	f.eventually("one that said nothing counts", heard(map[string]string{"a": "I am a", "b": "I am b", "c-1": ""}))
	f.ahead.Add(int64(20 * time.Second))
	f.eventually("those that are gone do not", heard(map[string]string{"a": "I am a"}))
	// Another start of an issuer has not said what the one before said.
	f.join("b-2", false)
	f.eventually("one that came back has said nothing yet", heard(map[string]string{"a": "I am a", "b-2": ""}))
}
