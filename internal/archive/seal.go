package archive

import (
	"errors"
	"fmt"
	"io"

	"filippo.io/age"
)

// Seal encrypts what is written to it for the owners of some keys, as
// age-keygen makes them. It is whole once Close has returned.
func Seal(w io.Writer, recipients ...string) (io.WriteCloser, error) {
	if len(recipients) == 0 {
		return nil, errors.New("no recipient: nobody could read it")
	}
	var keys []age.Recipient
	for _, r := range recipients {
		k, err := age.ParseX25519Recipient(r)
		if err != nil {
			return nil, fmt.Errorf("recipient %q: want a public key of age, such as age1...", r)
		}
		keys = append(keys, k)
	}
	return age.Encrypt(w, keys...)
}

// Unseal reads what Seal wrote. A part of it that was changed, or an end that
// is missing, is an error in the place of what was there.
func Unseal(r io.Reader, ids []age.Identity) (io.Reader, error) {
	return age.Decrypt(r, ids...)
}
