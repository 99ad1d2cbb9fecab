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

// ErrFull says that there is no room for another name, and ErrYielded that
// another process gives names their addresses.
var (
	ErrFull    = errors.New("no room for another name")
	ErrYielded = errors.New("another process has the book")
)

// A Book says which address stands for which name.
type Book struct {
	path   string
	v4, v6 netip.Prefix

	saving sync.Mutex // writes the file; taken before mu

	mu      sync.Mutex // guards the fields below
	names   map[string]entry
	byCell  map[uint32]string
	current map[string]bool // what the last Use named: never forgotten
	unsaved bool            // something is not in the file
	yielded bool            // the file is another's
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
	b := &Book{path: path, v4: v4.Masked(), v6: v6.Masked()}
	if !v4.Addr().Is4() || v4.Bits() < 8 || v4.Bits() > 24 || !v6.Addr().Is6() || v6.Bits() > 96 {
		return nil, fmt.Errorf("virtual addresses: %s and %s are no ranges for them", v4, v6)
	}
	var err error
	b.names, b.byCell, err = b.read()
	return b, err
}

// read reads the file.
func (b *Book) read() (names map[string]entry, byCell map[uint32]string, err error) {
	names, byCell = map[string]entry{}, map[uint32]string{}
	text, err := os.ReadFile(b.path)
	if errors.Is(err, fs.ErrNotExist) {
		return names, byCell, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("virtual addresses: %w", err)
	}
	if err := json.Unmarshal(text, &names); err != nil {
		return nil, nil, daemon.Hint(fmt.Errorf("virtual addresses: %s: %w", b.path, err), "remove the file; programs that remember an address must look it up again")
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		c := names[name].Cell
		if other, taken := byCell[c]; taken || !b.usable(c) {
			return nil, nil, daemon.Hint(fmt.Errorf("virtual addresses: %s: %s has the number %d, which is %s", b.path, name, c, holder(other)), "remove the file; programs that remember an address must look it up again")
		}
		byCell[c] = name
	}
	return names, byCell, nil
}

// Yield writes down what is not in the file yet, which from now on is another
// process's: until Adopt nothing is written, and no name gets an address by
// Assign that had none.
func (b *Book) Yield() error {
	b.mu.Lock()
	b.yielded = true
	b.mu.Unlock()
	return b.save(true)
}

// Adopt has the file be this book's again, and takes from it what the other
// process wrote.
func (b *Book) Adopt() error {
	b.saving.Lock()
	defer b.saving.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.yielded {
		return nil
	}
	b.yielded = false
	own := b.names
	names, byCell, err := b.read()
	if err != nil {
		b.unsaved = true // what is known here is better than nothing
		return err
	}
	b.names, b.byCell = names, byCell
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(own)) {
		if _, ok := names[name]; ok {
			continue
		}
		e := own[name]
		if _, taken := byCell[e.Cell]; taken {
			if e.Cell, err = b.free(name, time.Now()); err != nil {
				errs = append(errs, fmt.Errorf("virtual addresses: %s: %w", name, err))
				continue
			}
		}
		b.names[name], b.byCell[e.Cell], b.unsaved = e, name, true
	}
	return errors.Join(errs...)
}

func holder(other string) string {
	if other == "" {
		return "outside of the range"
	}
	return "that of " + other
}

func (b *Book) size() uint32         { return 1 << (32 - b.v4.Bits()) }
func (b *Book) usable(c uint32) bool { return c > 0 && c < b.size()-1 } // neither network nor broadcast

// Use gives addresses to the names that have none, and keeps these until the
// next Use. When the file cannot be written the addresses hold until the process
// ends.
func (b *Book) Use(names []string) error {
	err := b.use(names)
	return errors.Join(err, b.Save())
}

func (b *Book) use(names []string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now().UTC().Truncate(time.Second)
	var errs []error
	for name := range b.current {
		b.see(name, now) // it may be the last time
	}
	b.current = make(map[string]bool, len(names))
	for _, name := range names {
		b.current[name] = true
	}
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
		b.names[name], b.unsaved = e, true
	}
	return errors.Join(errs...)
}

// Seen notes that a name is in use.
func (b *Book) Seen(name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.see(name, time.Now().UTC().Truncate(time.Second))
}

// see is Seen for who holds mu.
func (b *Book) see(name string, now time.Time) {
	if e, ok := b.names[name]; ok && now.Sub(e.Seen) >= seenEvery {
		e.Seen = now
		b.names[name], b.unsaved = e, true
	}
}

// Assign is Use for one name, and leaves the file to Save. Names that a workload
// invents, such as those below a pattern, take at most half of the room.
func (b *Book) Assign(name string, invented bool) (v4, v6 netip.Addr, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now().UTC().Truncate(time.Second)
	e, ok := b.names[name]
	if !ok {
		if b.yielded {
			return netip.Addr{}, netip.Addr{}, ErrYielded
		}
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
func (b *Book) Save() error { return b.save(false) }

// save writes the file, while names are looked up: of a book that is yielded
// for the last time, or not at all.
func (b *Book) save(last bool) error {
	b.saving.Lock()
	defer b.saving.Unlock()
	b.mu.Lock()
	if !b.unsaved || b.yielded && !last {
		b.mu.Unlock()
		return nil
	}
	text, err := json.Marshal(b.names)
	b.unsaved = false
	b.mu.Unlock()
	if err == nil {
		err = daemon.WriteFile(b.path, text, 0o600)
	}
	if err != nil {
		b.mu.Lock()
		b.unsaved = true
		b.mu.Unlock()
		return fmt.Errorf("virtual addresses: %w", err)
	}
	return nil
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
		if now.Sub(e.Seen) > reserve && !b.current[name] {
			delete(b.names, name)
			delete(b.byCell, e.Cell)
		}
	}
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
