// Package virtual gives names addresses that lead nowhere but to the sidecar of
// the machine they are used on.
//
// A Book keeps which address stands for which name, also over a restart, so
// that what a program remembers stays true: an address that has stood for a
// name stands for no other until that name was gone for a month. It has no
// goroutine.
package virtual

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"sallyport/internal/daemon"
)

const (
	// reserve is how long the address of a name that is gone is kept for it.
	reserve = 30 * 24 * time.Hour
	// maxNames bounds the book.
	maxNames = 1 << 16
	// seenEvery is how old the note of when a name was last seen may become, so
	// that the file is not written for each policy.
	seenEvery = 24 * time.Hour
)

// ErrFull says that there is no room for another name.
var ErrFull = errors.New("no room for another name")

// A Book says which address stands for which name.
type Book struct {
	path   string
	v4, v6 netip.Prefix

	mu      sync.Mutex // guards the fields below
	names   map[string]entry
	byCell  map[uint32]string
	unsaved bool // something that Assign did is not in the file
}

// entry is a name in the file.
type entry struct {
	// Cell is the number of its addresses within both ranges.
	Cell uint32    `json:"cell"`
	Seen time.Time `json:"seen"`
}

// Open reads the book from a file, which need not be there yet. The ranges are
// an IPv4 prefix of 8 to 24 bits and an IPv6 prefix of at most 96.
func Open(path string, v4, v6 netip.Prefix) (*Book, error) {
	b := &Book{path: path, v4: v4.Masked(), v6: v6.Masked(), names: map[string]entry{}, byCell: map[uint32]string{}}
	if !v4.Addr().Is4() || v4.Bits() < 8 || v4.Bits() > 24 || !v6.Addr().Is6() || v6.Bits() > 96 {
		return nil, fmt.Errorf("virtual addresses: %s and %s are no ranges for them", v4, v6)
	}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return b, nil
	}
	if err != nil {
		return nil, fmt.Errorf("virtual addresses: %w", err)
	}
	if err := json.Unmarshal(text, &b.names); err != nil {
		return nil, daemon.Hint(fmt.Errorf("virtual addresses: %s: %w", path, err), "remove the file; programs that remember an address must look it up again")
	}
	for _, name := range slices.Sorted(maps.Keys(b.names)) {
		c := b.names[name].Cell
		if other, taken := b.byCell[c]; taken || !b.usable(c) {
			return nil, daemon.Hint(fmt.Errorf("virtual addresses: %s: %s has the number %d, which is %s", path, name, c, holder(other)), "remove the file; programs that remember an address must look it up again")
		}
		b.byCell[c] = name
	}
	return b, nil
}

func holder(other string) string {
	if other == "" {
		return "outside of the range"
	}
	return "that of " + other
}

func (b *Book) size() uint32         { return 1 << (32 - b.v4.Bits()) }
func (b *Book) usable(c uint32) bool { return c > 0 && c < b.size()-1 } // neither network nor broadcast

// Use gives addresses to the names that have none. When the file cannot be
// written the addresses hold until the process ends.
func (b *Book) Use(names []string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now().UTC().Truncate(time.Second)
	var errs []error
	changed := false
	for _, name := range names {
		e, ok := b.names[name]
		if ok && now.Sub(e.Seen) < seenEvery {
			continue
		}
		if !ok {
			c, err := b.free(name, now)
			if err != nil {
				errs = append(errs, fmt.Errorf("virtual addresses: %s: %w", name, err))
				continue
			}
			e.Cell = c
			b.byCell[c] = name
		}
		e.Seen = now
		b.names[name], changed = e, true
	}
	if changed {
		errs = append(errs, b.save())
	}
	return errors.Join(errs...)
}

// Assign is Use for one name, and leaves the file to Save. Names that a workload
// invents, such as those below a pattern, take at most half of the room.
func (b *Book) Assign(name string, invented bool) (v4, v6 netip.Addr, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now().UTC().Truncate(time.Second)
	e, ok := b.names[name]
	if !ok {
		if invented && len(b.names) >= b.room()/2 {
			b.forget(now)
			if len(b.names) >= b.room()/2 {
				return netip.Addr{}, netip.Addr{}, ErrFull
			}
		}
		if e.Cell, err = b.free(name, now); err != nil {
			return netip.Addr{}, netip.Addr{}, err
		}
		b.byCell[e.Cell] = name
	}
	if now.Sub(e.Seen) >= seenEvery {
		e.Seen, b.unsaved = now, true
		b.names[name] = e
	}
	v4, v6 = b.at(e.Cell)
	return v4, v6, nil
}

// Save writes down what Assign did.
func (b *Book) Save() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.unsaved {
		return nil
	}
	return b.save()
}

// room is for how many names there are numbers.
func (b *Book) room() int { return min(maxNames, int(b.size()/2)) }

// free finds a number for a name: where its hash points, or the next that
// stands for nobody, so that most books agree.
func (b *Book) free(name string, now time.Time) (uint32, error) {
	if len(b.names) >= b.room() {
		b.forget(now)
	}
	if len(b.names) >= b.room() {
		return 0, ErrFull
	}
	sum := sha256.Sum256([]byte(name))
	for c := binary.BigEndian.Uint32(sum[:]) % b.size(); ; c = (c + 1) % b.size() {
		if _, taken := b.byCell[c]; b.usable(c) && !taken {
			return c, nil
		}
	}
}

// forget drops the names that have been gone for long enough.
func (b *Book) forget(now time.Time) {
	for name, e := range b.names {
		if now.Sub(e.Seen) > reserve {
			delete(b.names, name)
			delete(b.byCell, e.Cell)
		}
	}
}

func (b *Book) save() error {
	text, err := json.Marshal(b.names)
	if err != nil {
		return err
	}
	if err := daemon.WriteFile(b.path, text, 0o600); err != nil {
		return fmt.Errorf("virtual addresses: %w", err)
	}
	b.unsaved = false
	return nil
}

// Addresses are those that stand for a name.
func (b *Book) Addresses(name string) (v4, v6 netip.Addr, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	e, ok := b.names[name]
	if !ok {
		return netip.Addr{}, netip.Addr{}, false
	}
	v4, v6 = b.at(e.Cell)
	return v4, v6, true
}

func (b *Book) at(cell uint32) (v4, v6 netip.Addr) {
	a4, a6 := b.v4.Addr().As4(), b.v6.Addr().As16()
	binary.BigEndian.PutUint32(a4[:], binary.BigEndian.Uint32(a4[:])|cell)
	binary.BigEndian.PutUint32(a6[12:], cell)
	return netip.AddrFrom4(a4), netip.AddrFrom16(a6)
}

// Name is what an address stands for.
func (b *Book) Name(a netip.Addr) (string, bool) {
	a = a.Unmap()
	var c uint32
	switch {
	case b.v4.Contains(a):
		v := a.As4()
		c = binary.BigEndian.Uint32(v[:]) & (b.size() - 1)
	case b.v6.Contains(a):
		v := a.As16()
		c = binary.BigEndian.Uint32(v[12:])
		base := b.v6.Addr().As16()
		if !slices.Equal(v[:12], base[:12]) {
			return "", false
		}
	default:
		return "", false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	name, ok := b.byCell[c]
	return name, ok
}
