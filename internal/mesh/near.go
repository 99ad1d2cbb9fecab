package mesh

// DidYouMean goes on from a sentence about an unknown word: with the known one
// that it is likely a slip of, or with all of them.
func DidYouMean(s string, known []string) string { return didYouMean(s, known) }

// nearest returns the candidate that s is most likely a slip of, or "" when
// none is near: at most one edit for up to three bytes, two up to seven, then
// three. A swap of neighbours is one edit.
func nearest(s string, candidates []string) string {
	limit := 1
	switch {
	case len(s) > 7:
		limit = 3
	case len(s) > 3:
		limit = 2
	}
	best, at := "", limit+1
	for _, c := range candidates {
		if d := editDistance(s, c); d < at {
			best, at = c, d
		}
	}
	return best
}

// editDistance is the optimal string alignment distance, over bytes. Long
// words are not compared: nobody mistypes them into a field name.
func editDistance(a, b string) int {
	const longest = 64
	if len(a) > longest || len(b) > longest {
		return longest
	}
	var rows [3][longest + 1]int
	prev2, prev, cur := rows[0][:], rows[1][:], rows[2][:]
	for j := 0; j <= len(b); j++ {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				cur[j] = min(cur[j], prev2[j-2]+1)
			}
		}
		prev2, prev, cur = prev, cur, prev2
	}
	return prev[len(b)]
}
