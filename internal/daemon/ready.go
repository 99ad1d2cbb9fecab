package daemon

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
)

var (
	errNothing = errors.New("not ready: nothing has reported yet")
	errWaiting = errors.New("waiting")
)

// Ready collects the conditions under which a process may take work. The zero
// value is not ready: somebody must say so first.
type Ready struct {
	mu         sync.Mutex // guards conditions
	conditions map[string]error
}

// Expect names conditions that must be set before the process is ready.
func (r *Ready) Expect(names ...string) {
	for _, n := range names {
		r.Set(n, errWaiting)
	}
}

// Set records that the named condition holds (nil) or why it does not.
func (r *Ready) Set(name string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conditions == nil {
		r.conditions = make(map[string]error)
	}
	r.conditions[name] = err
}

// Err returns nil when every condition holds, else all that do not, by name.
func (r *Ready) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.conditions) == 0 {
		return errNothing
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(r.conditions)) {
		if err := r.conditions[name]; err != nil {
			errs = append(errs, fmt.Errorf("not ready: %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}
