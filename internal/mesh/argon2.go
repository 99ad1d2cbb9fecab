package mesh

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
)

// An Argon2 is an argon2id hash as its PHC text writes it.
type Argon2 struct {
	Memory, Time uint32 // KiB, passes
	Threads      uint8
	Salt, Sum    []byte
}

// Bounds of an Argon2: who can write one may not make each guess cost more.
const (
	minArgonMemory, maxArgonMemory = 8 << 10, 64 << 10 // KiB
	maxArgonTime, maxArgonThreads  = 10, 4
)

// ParseArgon2 reads "$argon2id$v=19$m=19456,t=2,p=1$SALT$HASH". No error quotes
// it.
func ParseArgon2(s string) (Argon2, error) {
	var a Argon2
	n, err := fmt.Sscanf(s, "$argon2id$v=19$m=%d,t=%d,p=%d$", &a.Memory, &a.Time, &a.Threads)
	head := fmt.Sprintf("$argon2id$v=19$m=%d,t=%d,p=%d$", a.Memory, a.Time, a.Threads)
	if err != nil || n != 3 || len(s) < len(head) || s[:len(head)] != head {
		return Argon2{}, errors.New("an argon2id hash does not look like $argon2id$v=19$m=19456,t=2,p=1$SALT$HASH")
	}
	salt, sum, _ := strings.Cut(s[len(head):], "$")
	var err1, err2 error
	a.Salt, err1 = base64.RawStdEncoding.Strict().DecodeString(salt)
	a.Sum, err2 = base64.RawStdEncoding.Strict().DecodeString(sum)
	switch {
	case err1 != nil || err2 != nil || len(a.Salt) < 8 || len(a.Salt) > 64 || len(a.Sum) < 16 || len(a.Sum) > 64:
		return Argon2{}, errors.New("an argon2id hash has no salt of 8 to 64 bytes and sum of 16 to 64, in base64")
	case a.Memory < minArgonMemory || a.Memory > maxArgonMemory || a.Time < 1 || a.Time > maxArgonTime || a.Threads < 1 || a.Threads > maxArgonThreads:
		return Argon2{}, fmt.Errorf("an argon2id hash does not have m from %d to %d, t to %d, p to %d", minArgonMemory, maxArgonMemory, maxArgonTime, maxArgonThreads)
	}
	return a, nil
}

// String is the form that ParseArgon2 reads.
func (a Argon2) String() string {
	e := base64.RawStdEncoding.EncodeToString
	return fmt.Sprintf("$argon2id$v=19$m=%d,t=%d,p=%d$%s$%s", a.Memory, a.Time, a.Threads, e(a.Salt), e(a.Sum))
}
