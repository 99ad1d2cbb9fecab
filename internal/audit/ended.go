package audit

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strconv"
)

// ended is the name of a copy of a log that another one followed.
var ended = regexp.MustCompile(`^(.+)` + regexp.QuoteMeta(endedMark) + `([0-9]+)$`)

const (
	endedMark = ".old-"
	// headsSuffix names what witnesses had signed of the log, and of those before
	// it, when another one followed: the witness forgets the oldest.
	headsSuffix = ".heads"
)

// noteHeads keeps what is signed now beside a copy that has ended.
func noteHeads(path string, heads []Head) error {
	b, err := json.Marshal(heads)
	if err != nil {
		return fmt.Errorf("note heads of audit log: %w", err)
	}
	return replaceFile(path+headsSuffix, b)
}

// notedHeads are the heads of when a copy ended, and before.
func notedHeads(path string) (out []Head, err error) {
	b, err := os.ReadFile(path + headsSuffix)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var heads []Head
	if err := json.Unmarshal(b, &heads); err != nil {
		return nil, fmt.Errorf("%s: %w", path+headsSuffix, err)
	}
	for _, h := range heads {
		out = append(append(out, h), h.Before...)
	}
	return out, nil
}

// disowned refuses a copy of a log that has ended, and that no head fits, when
// one of those noted is within it and is of no log whose copy is beside it: the
// log that it was signed of is then most likely the one that was to be here.
// Heads are those that are known now, by which other logs are found.
func disowned(path string, within func(Head) bool, noted, heads []Head) error {
	inside := slices.DeleteFunc(slices.Clone(noted), func(h Head) bool { return !within(h) })
	if len(inside) == 0 {
		return nil
	}
	all := slices.Clone(noted)
	for _, h := range heads {
		all = append(append(all, h), h.Before...)
	}
	others, err := neighbours(path)
	if err != nil {
		return err
	}
	for _, h := range inside {
		same := slices.DeleteFunc(slices.Clone(all), func(o Head) bool { return o.Key != h.Key })
		owned, err := anyFits(others, same)
		if err != nil {
			return err
		}
		if !owned {
			return fmt.Errorf("the copy is not the log that was cosigned up to record %d before it ended, and nothing is removed; run audit verify, and move the copy away to keep it elsewhere", h.Size)
		}
	}
	return nil
}

// neighbours are the copies of the logs about the one at path, which has ended:
// the one that followed and as many before as heads are remembered.
func neighbours(path string) (out []string, err error) {
	m := ended.FindStringSubmatch(path)
	n, err := strconv.Atoi(m[2])
	if err != nil {
		return nil, err
	}
	names := []string{m[1]}
	for i := max(1, n-keepHeads); i <= n+1; i++ {
		if i != n {
			names = append(names, m[1]+endedMark+strconv.Itoa(i))
		}
	}
	for _, name := range names {
		if _, err := os.Stat(name); err == nil {
			out = append(out, name)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return out, nil
}

// anyFits says if one of the copies is the log that one of the heads is of.
func anyFits(paths []string, heads []Head) (bool, error) {
	for _, path := range paths {
		gone, err := kept(path)
		if err != nil {
			return false, err
		}
		if slices.ContainsFunc(heads, func(h Head) bool {
			c, err := OpenCheckpoint(h.Note, h.Key)
			return err == nil && gone.removal != nil && c.Size == gone.Last && sum(c.Root) == gone.Root
		}) {
			return true, nil
		}
		switch _, err := fitting(path, gone.last()+1, heads, gone.removal); {
		case err == nil:
			return true, nil
		case !errors.Is(err, errNoneFits):
			return false, err
		}
	}
	return false, nil
}
