package main

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/capture"
	"sallyport/internal/mesh"
)

func TestCallersAreLookedIntoAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c callers
		looks := 0
		ask := func(p capture.Process, failure error) error {
			_, err := c.selectors(p, func() ([]mesh.Selector, error) { looks++; return nil, failure })
			return err
		}
		expect := func(want int, why string) {
			t.Helper()
			if looks != want {
				t.Errorf("%s: looked %d times, want %d", why, looks, want)
			}
		}
		p := capture.Process{PID: 7, Start: 1, UID: 1000}
		_ = ask(p, nil)
		_ = ask(p, nil)
		expect(1, "the same process at once")
		other := p
		other.ExeInode = 9
		_ = ask(other, nil)
		expect(2, "another executable")
		time.Sleep(callerHolds)
		_ = ask(other, nil)
		expect(3, "a moment later")
		broken := capture.Process{PID: 8, Start: 1}
		for range 2 {
			if err := ask(broken, errors.New("it is gone")); err == nil {
				t.Error("a failure is an answer")
			}
		}
		expect(5, "a failure is not remembered")
	})
}
