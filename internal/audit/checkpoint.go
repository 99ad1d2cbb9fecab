package audit

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// A Checkpoint says how long a log was and what its tree hash was then: the
// text of C2SP tlog-checkpoint. Origin names the log.
type Checkpoint struct {
	Origin string
	Size   uint64
	Root   [32]byte
}

const maxCheckpoint = 16 << 10 // bytes, with all its signatures

func (c Checkpoint) text() string {
	return c.Origin + "\n" + strconv.FormatUint(c.Size, 10) + "\n" + base64.StdEncoding.EncodeToString(c.Root[:]) + "\n"
}

func parseCheckpoint(text string) (c Checkpoint, err error) {
	lines := strings.Split(text, "\n")
	if len(lines) != 4 || lines[3] != "" || lines[0] == "" {
		return c, errors.New("a checkpoint has three lines: origin, size and hash")
	}
	c.Origin = lines[0]
	if c.Size, err = strconv.ParseUint(lines[1], 10, 63); err != nil || strconv.FormatUint(c.Size, 10) != lines[1] {
		return c, fmt.Errorf("size %q of a checkpoint is no number", lines[1])
	}
	root, err := base64.StdEncoding.Strict().DecodeString(lines[2])
	if err != nil || len(root) != len(c.Root) {
		return c, errors.New("the hash of a checkpoint is not a SHA-256 in base64")
	}
	copy(c.Root[:], root)
	return c, nil
}

// OpenCheckpoint checks the signature of a log with the verifier key given and
// returns what it signed.
func OpenCheckpoint(signed []byte, key string) (Checkpoint, error) {
	v, err := note.NewVerifier(key)
	if err != nil {
		return Checkpoint{}, fmt.Errorf("key of the log: %w", err)
	}
	if len(signed) > maxCheckpoint {
		return Checkpoint{}, fmt.Errorf("checkpoint of %d bytes, at most %d", len(signed), maxCheckpoint)
	}
	n, err := note.Open(signed, note.VerifierList(v))
	if err != nil {
		return Checkpoint{}, fmt.Errorf("checkpoint: %w", err)
	}
	c, err := parseCheckpoint(n.Text)
	if err == nil && c.Origin != v.Name() {
		err = fmt.Errorf("checkpoint of %q is signed by %q", c.Origin, v.Name())
	}
	return c, err
}

// openKey reads the signing key in a file, and makes one when there is none.
// The name of a new key is prefix and a hash of the key.
func openKey(path, prefix string) (ed25519.PrivateKey, string, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return makeKey(path, prefix)
	}
	if err != nil {
		return nil, "", err
	}
	seed, err := hex.DecodeString(strings.TrimSpace(string(b)))
	if err != nil || len(seed) != ed25519.SeedSize {
		return nil, "", fmt.Errorf("%s holds no key; move it away to make another", path)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm()&0o077 != 0 {
		return nil, "", errors.Join(fmt.Errorf("%s can be read by others; chmod 600 it", path), err)
	}
	key := ed25519.NewKeyFromSeed(seed)
	return key, keyName(prefix, key), nil
}

func makeKey(path, prefix string) (ed25519.PrivateKey, string, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, "", err
	}
	return key, keyName(prefix, key), replaceFile(path, []byte(hex.EncodeToString(key.Seed())+"\n"))
}

func keyName(prefix string, key ed25519.PrivateKey) string {
	sum := sha256.Sum256(key.Public().(ed25519.PublicKey)) //nolint:forcetypeassert // always is
	return prefix + hex.EncodeToString(sum[:8])
}

// The algorithms of C2SP signed-note.
const (
	algEd25519  = 1
	algCosigned = 4 // cosignature/v1, with a time
)

// noteKey signs notes. The alg says in which form.
type noteKey struct {
	name string
	alg  byte
	key  ed25519.PrivateKey
	now  func() time.Time
}

func (k *noteKey) Name() string { return k.name }

// named is the same key under another name.
func (k *noteKey) named(name string) *noteKey {
	return &noteKey{name: name, alg: k.alg, key: k.key, now: k.now}
}

func (k *noteKey) public() []byte {
	return append([]byte{k.alg}, k.key.Public().(ed25519.PublicKey)...) //nolint:forcetypeassert // always is
}

func (k *noteKey) KeyHash() uint32 { return noteHash(k.name, k.public()) }

func noteHash(name string, public []byte) uint32 {
	sum := sha256.Sum256(append([]byte(name+"\n"), public...))
	return binary.BigEndian.Uint32(sum[:])
}

// verifier is the text by which others know the key.
func (k *noteKey) verifier() string { return verifierText(k.name, k.public()) }

func verifierText(name string, public []byte) string {
	return fmt.Sprintf("%s+%08x+%s", name, noteHash(name, public), base64.StdEncoding.EncodeToString(public))
}

// opener verifies what the key has signed.
func (k *noteKey) opener() (note.Verifier, error) {
	if k.alg == algCosigned {
		return parseWitnessKey(k.verifier())
	}
	return note.NewVerifier(k.verifier())
}

func decodeKey(data string) ([]byte, error) { return base64.StdEncoding.DecodeString(data) }

func (k *noteKey) Sign(msg []byte) ([]byte, error) {
	if k.alg == algEd25519 {
		return ed25519.Sign(k.key, msg), nil
	}
	at := uint64(k.now().Unix()) //nolint:gosec // after 1970
	return append(binary.BigEndian.AppendUint64(nil, at), ed25519.Sign(k.key, cosigned(at, msg))...), nil
}

func cosigned(at uint64, msg []byte) []byte {
	return append([]byte("cosignature/v1\ntime "+strconv.FormatUint(at, 10)+"\n"), msg...)
}

// witnessKey verifies cosignatures and remembers the time of the last.
type witnessKey struct {
	name string
	hash uint32
	key  ed25519.PublicKey
	at   time.Time
}

func parseWitnessKey(text string) (*witnessKey, error) {
	name, rest, _ := strings.Cut(text, "+")
	hash, data, ok := strings.Cut(rest, "+")
	b, err := base64.StdEncoding.DecodeString(data)
	if !ok || name == "" || err != nil || len(b) != 1+ed25519.PublicKeySize || b[0] != algCosigned {
		return nil, fmt.Errorf("%q is no key of a witness: want name+hash+base64", cut(text, 120))
	}
	w := &witnessKey{name: name, hash: noteHash(name, b), key: b[1:]}
	if fmt.Sprintf("%08x", w.hash) != hash {
		return nil, fmt.Errorf("the hash in the key of witness %s is wrong", name)
	}
	return w, nil
}

func (w *witnessKey) Name() string    { return w.name }
func (w *witnessKey) KeyHash() uint32 { return w.hash }

func (w *witnessKey) Verify(msg, sig []byte) bool {
	if len(sig) != 8+ed25519.SignatureSize {
		return false
	}
	at := binary.BigEndian.Uint64(sig)
	if at > 1<<40 || !ed25519.Verify(w.key, cosigned(at, msg), sig[8:]) {
		return false
	}
	w.at = time.Unix(int64(at), 0)
	return true
}

// OpenCosigned checks a checkpoint that a witness has signed, too, and returns
// when it did. The witness is one of the keys given.
func OpenCosigned(signed []byte, key string, witnesses []string) (c Checkpoint, at time.Time, err error) {
	if c, err = OpenCheckpoint(signed, key); err != nil {
		return c, at, err
	}
	for _, text := range witnesses {
		w, err := parseWitnessKey(text)
		if err != nil {
			return c, at, err
		}
		_, err = note.Open(signed, note.VerifierList(w))
		var bad *note.InvalidSignatureError
		if errors.As(err, &bad) {
			return c, at, fmt.Errorf("checkpoint: %w", err)
		}
		if err == nil && w.at.After(at) {
			at = w.at
		}
	}
	if at.IsZero() {
		return c, at, errNoWitness
	}
	return c, at, nil
}

var errNoWitness = errors.New("checkpoint: no witness whose key is known has signed it")

// hashes puts proofs into the form of the wire.
func hashes[P ~[]tlog.Hash](p P) [][]byte {
	out := make([][]byte, len(p))
	for i := range p {
		out[i] = p[i][:]
	}
	return out
}

func parseHashes(b [][]byte) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(b))
	for i := range b {
		if len(b[i]) != tlog.HashSize {
			return nil, fmt.Errorf("hash %d of a proof has %d bytes", i, len(b[i]))
		}
		copy(out[i][:], b[i])
	}
	return out, nil
}
