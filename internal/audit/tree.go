package audit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

const (
	// tileHeight makes tiles of 256 hashes (C2SP tlog-tiles).
	tileHeight = 8
	tileWidth  = 1 << tileHeight

	// signEvery and signAfter are when a checkpoint is signed, at the latest.
	signEvery = time.Second
	signAfter = 4096

	treeSuffix     = ".tiles"
	checkpointFile = "checkpoint"
	cosignedFile   = "cosigned"
	keyFile        = "log.key"
	verifierFile   = "log.vkey"
	originPrefix   = "sallyport-audit-"
)

// A Tree is the Merkle tree (RFC 6962) over the lines of a log, in tiles of C2SP
// tlog-tiles in the directory <log>.tiles, with a signed checkpoint. Leaf n is
// line n+1 with its line feed. It follows the log: what it holds is on the
// disk, and what a crash took from it is made again from the log.
type Tree struct {
	log *Log
	dir string
	key *noteKey

	// mu guards what follows.
	mu   sync.Mutex
	edge edge
	tail *Tail
	// witnessed is how many records a witness has signed, as far as is known.
	witnessed uint64
	// size and signedRoot are those of the newest checkpoint.
	size       uint64
	signedRoot tlog.Hash
}

// edge is the right side of a tree: at each level the hashes of the tile that
// is not full.
type edge struct {
	size   uint64
	levels [][]tlog.Hash
}

// add adds a leaf. full is told each tile that has become full.
func (e *edge) add(h tlog.Hash, full func(level int, n uint64, tile []tlog.Hash) error) error {
	n := e.size
	e.size++
	for level := 0; ; level++ {
		if level == len(e.levels) {
			e.levels = append(e.levels, make([]tlog.Hash, 0, tileWidth))
		}
		e.levels[level] = append(e.levels[level], h)
		if len(e.levels[level]) < tileWidth {
			return nil
		}
		n >>= tileHeight
		if err := full(level, n, e.levels[level]); err != nil {
			return err
		}
		h = subtree(e.levels[level])
		e.levels[level] = e.levels[level][:0]
	}
}

// subtree is the hash of a tree whose leaves are 2^n hashes.
func subtree(hs []tlog.Hash) tlog.Hash {
	if len(hs) == 1 {
		return hs[0]
	}
	half := len(hs) / 2
	return tlog.NodeHash(subtree(hs[:half]), subtree(hs[half:]))
}

// root is the hash of the tree.
func (e *edge) root() tlog.Hash {
	var h tlog.Hash
	have := false
	for _, hs := range e.levels {
		for left := len(hs); left > 0; {
			width := left & -left // the smallest whole subtree at the right
			sub := subtree(hs[left-width : left])
			if left -= width; have {
				h = tlog.NodeHash(sub, h)
			} else {
				h, have = sub, true
			}
		}
	}
	if !have {
		h, _ = tlog.TreeHash(0, nil) // of the empty tree it is known
	}
	return h
}

// OpenTree opens the tree of a log, or makes it.
func OpenTree(log *Log) (*Tree, error) {
	t := &Tree{log: log, dir: log.cfg.Path + treeSuffix}
	if err := os.MkdirAll(t.dir, 0o700); err != nil {
		return nil, fmt.Errorf("open audit tree: %w", err)
	}
	key, name, err := openKey(filepath.Join(t.dir, keyFile), originPrefix)
	if err != nil {
		return nil, fmt.Errorf("open audit tree: %w", err)
	}
	t.key = &noteKey{name: name, alg: algEd25519, key: key}
	if err := replaceFile(filepath.Join(t.dir, verifierFile), []byte(t.key.verifier()+"\n")); err != nil {
		return nil, fmt.Errorf("open audit tree: %w", err)
	}
	if err := t.resume(); err != nil {
		return nil, fmt.Errorf("open audit tree %s: %w", t.dir, err)
	}
	t.recall()
	return t, t.seek()
}

// recall reads what a witness has signed. Without it nothing is removed until a
// witness signs again.
func (t *Tree) recall() {
	b, err := os.ReadFile(filepath.Join(t.dir, cosignedFile))
	if err != nil {
		return
	}
	name, _, _ := strings.Cut(string(b), "\n")
	if c, err := OpenCheckpoint(b, t.key.named(name).verifier()); err == nil {
		t.witnessed = c.Size
	}
}

// Witnessed is how many records a witness has signed.
func (t *Tree) Witnessed() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.witnessed
}

// Key is the verifier key of the log, in the form of package note.
func (t *Tree) Key() string { return t.key.verifier() }

// resume continues where the checkpoint stands, or starts again from the first
// record when the tiles do not add up to it.
func (t *Tree) resume() error {
	signed, err := os.ReadFile(filepath.Join(t.dir, checkpointFile))
	if errors.Is(err, fs.ErrNotExist) {
		t.edge, err = t.begin()
		return err
	}
	if err != nil {
		return err
	}
	c, err := OpenCheckpoint(signed, t.Key())
	if err != nil {
		return err
	}
	if head, _ := t.log.Head(); c.Size > head {
		return fmt.Errorf("the log has %d records, its checkpoint speaks of %d: records were cut off; keep both and call for help, or move the directory away to begin another log", head, c.Size)
	}
	e := edge{size: c.Size}
	for level := 0; c.Size>>(level*tileHeight) > 0; level++ {
		n := c.Size >> (level * tileHeight)
		hs, err := readTile(t.dir, level, n/tileWidth, int(n%tileWidth))
		if err != nil {
			e.size = 0
			break
		}
		e.levels = append(e.levels, append(make([]tlog.Hash, 0, tileWidth), hs...))
	}
	if e.size == c.Size && [32]byte(e.root()) == c.Root {
		t.edge = e
		t.size, t.signedRoot = c.Size, c.Root
		return nil
	}
	t.log.cfg.Log.Warn("tiles of the audit tree are damaged; they are made again", "dir", t.dir)
	return t.rebuild(c)
}

// begin is the tree of the records that were removed.
func (t *Tree) begin() (edge, error) {
	gone, err := kept(t.log.cfg.Path)
	if err != nil || gone.removal == nil {
		return edge{}, err
	}
	v, err := t.key.opener()
	if err == nil {
		err = gone.signedBy(v)
	}
	if err != nil {
		return edge{}, fmt.Errorf("%s: %w; the key that has signed it is gone: move the whole log away to begin another", filepath.Base(t.log.cfg.Path)+keptSuffix, err)
	}
	return gone.edge(), nil
}

// rebuild makes all tiles anew and holds them against the checkpoint.
func (t *Tree) rebuild(c Checkpoint) error {
	var err error
	if t.edge, err = t.begin(); err != nil {
		return err
	}
	if t.edge.size > c.Size {
		return fmt.Errorf("the checkpoint speaks of %d records, and %d were removed", c.Size, t.edge.size)
	}
	err = t.log.lines(t.edge.size, c.Size, func(b []byte) error { return t.edge.add(tlog.RecordHash(b), t.writeTile) })
	if err != nil {
		return err
	}
	if [32]byte(t.edge.root()) != c.Root {
		return errors.New("the log is not what its checkpoint speaks of: records were changed; keep both and call for help, or move the directory away to begin another log")
	}
	return nil
}

// Run signs a checkpoint every second in which there were records, or after
// 4,096 of them, until ctx ends and once more then. What keeps it from signing
// is logged, and tried again: the records themselves do not depend on it.
func (t *Tree) Run(ctx context.Context) error {
	tick := time.NewTicker(signEvery / 20)
	defer tick.Stop()
	last, failed := time.Now(), false
	for ended := false; !ended; {
		select {
		case <-ctx.Done():
			ended = true
		case <-tick.C:
		}
		if !ended && time.Since(last) < signEvery && (failed || t.log.Durable() < t.Size()+signAfter) {
			continue
		}
		last = time.Now()
		err := t.Update()
		if err != nil && !failed {
			t.log.cfg.Log.Error("audit log has no new checkpoint; trying again", "dir", t.dir, "err", err)
		}
		failed = err != nil
	}
	return nil
}

// Size is how many records the newest checkpoint speaks of.
func (t *Tree) Size() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.size
}

// Update adds the records that are on the disk and signs a checkpoint. After an
// error the tree stands where its checkpoint stands.
func (t *Tree) Update() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	want := t.log.Durable()
	if want <= t.size {
		return nil
	}
	err := t.follow(want)
	if err == nil {
		err = t.sign()
	}
	if err == nil {
		return nil
	}
	err = fmt.Errorf("audit tree: %w", err)
	t.edge, t.size = edge{}, 0
	if again := t.resume(); again != nil {
		return errors.Join(err, again)
	}
	return errors.Join(err, t.seek())
}

// follow adds the records up to a number, under mu.
func (t *Tree) follow(want uint64) error {
	for t.edge.size < want {
		b, seq, err := t.tail.poll()
		if err == nil && (b == nil || seq != t.edge.size+1) {
			err = fmt.Errorf("record %d is not there", t.edge.size+1)
		}
		if err == nil {
			err = t.edge.add(tlog.RecordHash(b), t.writeTile)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// seek reads the log from behind the tree on, under mu.
func (t *Tree) seek() error {
	if t.tail != nil {
		t.tail.Close()
	}
	var err error
	t.tail, err = OpenTail(t.log.cfg.Path, t.edge.size)
	return err
}

// sign writes the tiles that are not full and a checkpoint, under mu.
func (t *Tree) sign() error {
	for level, hs := range t.edge.levels {
		n := t.edge.size >> ((level + 1) * tileHeight)
		if before := t.size >> (level * tileHeight); before == t.edge.size>>(level*tileHeight) && t.size > 0 {
			continue
		}
		if len(hs) > 0 {
			if err := t.writeTile(level, n, hs); err != nil {
				return err
			}
		}
		t.dropPartials(level, n, len(hs))
	}
	c := Checkpoint{Origin: t.key.name, Size: t.edge.size, Root: t.edge.root()}
	signed, err := note.Sign(&note.Note{Text: c.text()}, t.key)
	if err != nil {
		return err
	}
	if err := replaceFile(filepath.Join(t.dir, checkpointFile), signed); err != nil {
		return err
	}
	t.size, t.signedRoot = c.Size, c.Root
	return nil
}

// dropPartials removes narrower copies of a tile: a wider one begins with them.
func (t *Tree) dropPartials(level int, n uint64, width int) {
	for _, old := range []uint64{n, t.size >> ((level + 1) * tileHeight)} {
		dir := filepath.Join(t.dir, tilePath(level, old)+".p")
		names, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, e := range names {
			if w, err := strconv.Atoi(e.Name()); err != nil || old == n && w >= width && width > 0 {
				continue
			}
			_ = os.Remove(filepath.Join(dir, e.Name()))
		}
		_ = os.Remove(dir) // when it is empty
	}
}

// tilePath is the name of a tile by C2SP tlog-tiles, relative to the tree.
func tilePath(level int, n uint64) string {
	text := fmt.Sprintf("%03d", n%1000)
	for n >= 1000 {
		n /= 1000
		text = fmt.Sprintf("x%03d/%s", n%1000, text)
	}
	return fmt.Sprintf("tile/%d/%s", level, text)
}

func (t *Tree) writeTile(level int, n uint64, hs []tlog.Hash) error {
	name := filepath.Join(t.dir, tilePath(level, n))
	if len(hs) < tileWidth {
		name = filepath.Join(name+".p", strconv.Itoa(len(hs)))
	}
	b := make([]byte, 0, len(hs)*tlog.HashSize)
	for i := range hs {
		b = append(b, hs[i][:]...)
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	if len(hs) < tileWidth {
		// Not worth an fsync: what is damaged is made again from the log.
		if err := os.WriteFile(name+".new", b, 0o600); err != nil {
			return err
		}
		return os.Rename(name+".new", name)
	}
	return replaceFile(name, b)
}

// readTile reads the first width hashes of a tile.
func readTile(dir string, level int, n uint64, width int) ([]tlog.Hash, error) {
	if width == 0 {
		return nil, nil
	}
	name := filepath.Join(dir, tilePath(level, n))
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		for w := width; w < tileWidth && errors.Is(err, fs.ErrNotExist); w++ {
			b, err = os.ReadFile(filepath.Join(name+".p", strconv.Itoa(w)))
		}
	}
	if err != nil {
		return nil, err
	}
	if len(b) < width*tlog.HashSize || len(b)%tlog.HashSize != 0 {
		return nil, fmt.Errorf("%s has %d bytes, want %d", name, len(b), width*tlog.HashSize)
	}
	hs := make([]tlog.Hash, width)
	for i := range hs {
		copy(hs[i][:], b[i*tlog.HashSize:])
	}
	return hs, nil
}

// tiles reads tiles for package tlog, which checks what they hold.
type tiles string

func (d tiles) Height() int { return tileHeight }

func (d tiles) ReadTiles(ts []tlog.Tile) ([][]byte, error) {
	out := make([][]byte, len(ts))
	for i, t := range ts {
		hs, err := readTile(string(d), t.L, uint64(t.N), t.W) //nolint:gosec // not negative
		if err != nil {
			return nil, err
		}
		for _, h := range hs {
			out[i] = append(out[i], h[:]...)
		}
	}
	return out, nil
}

func (d tiles) SaveTiles([]tlog.Tile, [][]byte) {}

// Ask makes the request for a witness's signature: the newest checkpoint, signed
// under the name that the witness knows the log by, and the proof that the log
// of the size given is its beginning. The size is 0 for who knows nothing of
// the log yet. It reports false when there is no record yet.
func (t *Tree) Ask(name string, old uint64) (q CosignRequest, ok bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.size == 0 {
		return q, false, nil
	}
	root := t.signedRoot
	key := t.key.named(name)
	c := Checkpoint{Origin: name, Size: t.size, Root: root}
	signed, err := note.Sign(&note.Note{Text: c.text()}, key)
	if err != nil {
		return q, false, fmt.Errorf("sign audit log as %s: %w", name, err)
	}
	q = CosignRequest{Key: key.verifier(), Checkpoint: signed, OldSize: old}
	if old == 0 || old >= t.size {
		return q, true, nil
	}
	r := tlog.TileHashReader(tlog.Tree{N: int64(t.size), Hash: root}, tiles(t.dir)) //nolint:gosec // counts records
	p, err := tlog.ProveTree(int64(t.size), int64(old), r)                          //nolint:gosec // as above
	if err != nil {
		return q, false, fmt.Errorf("prove audit log: %w", err)
	}
	q.Proof = hashes(p)
	return q, true, nil
}

// Cosigned keeps a checkpoint that a witness has signed. What is not a
// checkpoint of this log is refused.
func (t *Tree) Cosigned(name string, signed []byte) error {
	c, err := OpenCheckpoint(signed, t.key.named(name).verifier())
	if err != nil {
		return fmt.Errorf("keep cosigned checkpoint: %w", err)
	}
	if err := replaceFile(filepath.Join(t.dir, cosignedFile), signed); err != nil {
		return fmt.Errorf("keep cosigned checkpoint: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.witnessed = c.Size
	return nil
}

// replaceFile replaces a file as a whole, durably.
func replaceFile(path string, b []byte) error {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return errors.Join(os.Rename(path+".new", path), syncDir(filepath.Dir(path)))
}

// TreeDir is where the tree of the log at path is.
func TreeDir(path string) string { return path + treeSuffix }
