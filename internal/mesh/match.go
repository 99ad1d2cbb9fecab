package mesh

import (
	"strconv"
	"strings"
)

// Any is the pattern that matches everything its column may hold.
const Any = "**"

// MatchSegments reports whether s matches pattern, both split at "/".
// A segment "*" stands for one non-empty segment, and "**", which counts only
// as the last segment, for any number of segments including none. Everything
// else is literal. The empty pattern and the empty string match nothing.
func MatchSegments(pattern, s string) bool {
	if pattern == "" || s == "" {
		return false
	}
	for {
		ps, prest, pmore := strings.Cut(pattern, "/")
		if ps == Any && !pmore {
			return true
		}
		ss, srest, smore := strings.Cut(s, "/")
		if ps == "*" {
			if ss == "" {
				return false
			}
		} else if ps != ss {
			return false
		}
		if !smore {
			return !pmore || prest == Any
		}
		if !pmore {
			return false
		}
		pattern, s = prest, srest
	}
}

// MatchSrc reports whether a caller, the text of a SPIFFE ID, matches the
// source pattern of a row: a SPIFFE ID, a segment pattern below a literal trust
// domain, or "**". A group matches nobody here: who judges expands groups.
func MatchSrc(pattern, id string) bool {
	rest, ok := strings.CutPrefix(id, "spiffe://")
	if !ok || rest == "" {
		return false
	}
	if pattern == Any {
		return true
	}
	prest, ok := strings.CutPrefix(pattern, "spiffe://")
	return ok && matchID(prest, rest)
}

// matchID compares two SPIFFE IDs without their scheme. The trust domain is
// compared as text, so that a pattern never reaches into another one.
func matchID(pattern, id string) bool {
	ptd, ppath, pok := strings.Cut(pattern, "/")
	td, path, ok := strings.Cut(id, "/")
	if td == "" || td != ptd {
		return false
	}
	if !pok || !ok {
		return pok == ok
	}
	return MatchSegments(ppath, path)
}

// MatchDst reports whether a destination matches the destination pattern of a
// row. In the direction In destinations are SPIFFE IDs and patterns are as in
// MatchSrc, "*" and "**" alike meaning every workload. In the direction Out they
// are "host:" and a name, and "host:*.example.com" stands for exactly one more
// label, never for the apex. Groups match nothing here.
func MatchDst(dir Direction, pattern, dst string) bool {
	switch dir {
	case In:
		if pattern == "*" {
			pattern = Any
		}
		return MatchSrc(pattern, dst)
	case Out:
		name, ok := strings.CutPrefix(dst, "host:")
		if !ok || name == "" {
			return false
		}
		want, ok := strings.CutPrefix(pattern, "host:")
		return ok && MatchHost(want, name)
	}
	return false
}

// MatchHost reports whether a host name is pattern, or is one label below it
// when pattern starts with "*.".
func MatchHost(pattern, name string) bool {
	if pattern == "" || name == "" {
		return false
	}
	apex, wild := strings.CutPrefix(pattern, "*.")
	if !wild {
		return pattern == name
	}
	label, rest, ok := strings.Cut(name, ".")
	return ok && label != "" && rest != "" && rest == apex
}

// MatchPort reports whether port matches the port column: a number or "*".
func MatchPort(pattern string, port uint16) bool {
	if port == 0 {
		return false
	}
	if pattern == "*" {
		return true
	}
	n, err := strconv.ParseUint(pattern, 10, 16)
	return err == nil && n == uint64(port)
}

// MatchVerb reports whether verb matches the verb column: "*", or methods
// joined by "|". Methods are compared as text: "get" is not "GET".
func MatchVerb(pattern, verb string) bool {
	if pattern == "" || verb == "" {
		return false
	}
	if pattern == "*" {
		return true
	}
	for more := true; more; {
		var v string
		v, pattern, more = strings.Cut(pattern, "|")
		if v == verb {
			return true
		}
	}
	return false
}

// MatchPath reports whether a path matches the path column. The path of a
// CONNECT is "-" and is matched by "-" and "**". Every other path starts with
// "/" and is compared as it will be forwarded: no normalisation happens here.
func MatchPath(pattern, path string) bool {
	switch {
	case pattern == "" || path == "":
		return false
	case path == "-":
		return pattern == "-" || pattern == Any
	case path[0] != '/':
		return false
	case pattern == Any:
		return true
	case pattern[0] != '/':
		return false
	}
	return MatchSegments(pattern, path)
}
